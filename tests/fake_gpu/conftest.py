"""The environments of the rehearsal, and a file of what its cases measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.environment import ROOT, Environment, environments

MEASURED = "measured"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearsal", type=Path, default=ROOT / ".rehearsal", help="folder of the environments")
    parser.addoption("--results", type=Path, help="write what the cases measured to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """`test_cuda_library.py` loads the library into this process, and skips where there is none."""
    library = config.getoption("--rehearsal").absolute() / "vllm-0.33" / "cuda" / "lib" / "libcuda.so.1"
    if library.exists():
        os.environ["FAKE_CUDA_LIB"] = str(library)
    results = config.getoption("--results")
    if results is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(results.absolute()))


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


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Adds what a case measured to the results file, under a name."""

    def add(name: str, values: dict[str, Any]) -> None:
        request.node.user_properties.append((MEASURED, (name, values)))

    return add


class Results:
    """Collects what the cases of all worker processes measured, and how long they took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        self._cases: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes up a case that has run."""
        if report.when == "call":
            name = report.nodeid.removeprefix("tests/fake_gpu/")
            self._seconds[name] = round(report.duration, 1)
            self._cases |= dict(value for key, value in report.user_properties if key == MEASURED)

    def pytest_sessionfinish(self) -> None:
        """Writes the file."""
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        content = {
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip()[:9],
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "seconds": dict(sorted(self._seconds.items())),
            "cases": dict(sorted(self._cases.items())),
        }
        self._path.write_text(json.dumps(content, indent=1) + "\n")
