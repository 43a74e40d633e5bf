"""Runs a program of this folder on several gloo ranks and returns what its rank 0 reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]


def run_ranks(program: str, nproc: int, tmp_path: Path, timeout: int = 420, **arguments: Any) -> Any:
    """`torchrun --nproc-per-node nproc programs/<program>.py ARGUMENTS.json REPORT.json`; the report's content.

    A rank that fails fails the test with the output of all of them.
    """
    given, report = tmp_path / f"{program}_arguments.json", tmp_path / f"{program}_report.json"
    given.write_text(json.dumps(arguments))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"),
            *(str(PROGRAMS / f"{program}.py"), str(given), str(report)),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=ROOT,
    )
    ranks = "\n".join(line for line in finished.stderr.splitlines() if line.startswith("[rank"))
    assert finished.returncode == 0, finished.stdout[-4000:] + (ranks or finished.stderr)[-8000:]
    return json.loads(report.read_text())
