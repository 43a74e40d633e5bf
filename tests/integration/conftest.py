"""One uninterrupted job that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.jobs import run_job, write_job


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config.yaml, run directory) of 6 steps on 2 ranks: student DP2, teacher TP2, a checkpoint every 2 steps."""
    directory = tmp_path_factory.mktemp("baseline")
    config = write_job(directory)
    ended = run_job(config, 2)
    assert ended.returncode == 0, ended.output[-4000:]
    assert ended.leftover == []
    return config, directory / "run"
