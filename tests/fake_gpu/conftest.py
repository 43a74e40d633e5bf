"""The environments of the rehearsal, and a file of what its cases measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.environment import ROOT, Environment, environments


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearsal", type=Path, default=ROOT / ".rehearsal", help="folder of the environments")
    parser.addoption("--results", type=Path, help="write what the cases measured to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """`test_cuda_library.py` loads the library into this process, and skips where there is none."""
    library = config.getoption("--rehearsal").absolute() / "vllm-0.33" / "cuda" / "lib" / "libcuda.so.1"
    if library.exists():
        os.environ["FAKE_CUDA_LIB"] = str(library)


@pytest.fixture(scope="session")
def pairs(request: pytest.FixtureRequest) -> dict[str, Environment]:
    """Every pair of vLLM and torch by its name; without their environments nothing can be rehearsed."""
    found = environments(request.config.getoption("--rehearsal").absolute())
    for environment in found.values():
        if not (environment.cuda / "env.sh").exists():
            pytest.exit(f"no {environment.cuda}: `make rehearse` builds the environments", returncode=2)
    return found


@pytest.fixture(scope="session")
def newest(pairs: dict[str, Environment]) -> Environment:
    """The pair that has Transformer Engine and ModelOpt."""
    return pairs["vllm-0.33"]


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What cases add to the results file, by their names."""
    found: dict[str, Any] = {}
    yield found
    if path := request.config.getoption("--results"):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        header = {
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip()[:9],
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        }
        path.write_text(json.dumps(header | {"cases": dict(sorted(found.items()))}, indent=1) + "\n")
