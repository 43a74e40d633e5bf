"""Training on CUDA devices whose operators compute, against the same training on the CPU, number for number."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fake_gpu.environment import ROOT, Environment
from tests.fake_gpu.launch import HERE, fake_environment


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_updates_are_the_cpus(newest: Environment, tmp_path: Path, ranks: int) -> None:
    """Scores, statistics, losses, gradients, weights, a checkpoint and a resume, in the layouts of so many ranks."""
    command = [newest.python, HERE / "compare_with_cpu.py", newest.cuda, tmp_path / "results"]
    ended = subprocess.run(
        [*map(str, command), "--ranks", str(ranks)],
        env=fake_environment(newest, {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
