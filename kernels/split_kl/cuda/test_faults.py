"""The emulation finds nothing in the source, and something in every copy with a seeded fault."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sead_kernels.split_kl.cuda.build import SOURCE
from sead_kernels.split_kl.cuda.faults import FAULTS, FILES, Fault
from sead_kernels.split_kl.native_build import find_program

if find_program("CXX", "g++", "c++") is None:
    pytest.skip("no C++ compiler for the emulation; install g++", allow_module_level=True)


def run_check(source: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sead_kernels.split_kl.cuda.emulated_check", str(source)]
    environment = {"SEAD_KERNELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the check said of every fault, on all cores."""

    def outcome(fault: Fault) -> subprocess.CompletedProcess[str]:
        directory = tmp_path_factory.mktemp("fault")
        (directory / "cuda").mkdir()
        for file in FILES:
            text = (SOURCE.parents[1] / file).read_text()
            (directory / file).write_text(fault.apply(text) if file == fault.file else text)
        return run_check(directory / "cuda" / SOURCE.name, directory)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((fault.name for fault in FAULTS), pool.map(outcome, FAULTS), strict=True))


def test_the_source_is_right(tmp_path: Path) -> None:
    done = run_check(SOURCE, tmp_path)
    assert done.returncode == 0 and "all kernels agree" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow  # three minutes of compiling
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_caught(fault: Fault, outcomes: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """By wrong numbers, a canary, or an abort: a compiler error or a Python exception would prove nothing."""
    done = outcomes[fault.name]
    assert "Traceback" not in done.stderr, done.stderr
    wrong_numbers = done.returncode == 1 and done.stdout.strip()
    misaligned = "runtime error" in done.stderr and "misaligned address" in done.stderr
    assert wrong_numbers or misaligned or done.returncode < 0, f"not caught: {done.stdout}{done.stderr}"
