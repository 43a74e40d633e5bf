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
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"),
        *(str(PROGRAMS / f"{program}.py"), str(given), str(report)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as launcher:
        try:
            stdout, stderr = launcher.communicate(timeout=timeout)
        except BaseException:
            # torchrun ends its ranks when it is asked to end, not when it is killed.
            launcher.terminate()
            raise
    ranks = "\n".join(line for line in stderr.splitlines() if line.startswith("[rank"))
    assert launcher.returncode == 0, stdout[-4000:] + (ranks or stderr)[-8000:]
    return json.loads(report.read_text())
