"""Runs one section: `python -m gpu_checks.worker NAME DIRECTORY DEVICE TINY LIMIT`, started by
`tools/gpu_check.py`, which kills it after LIMIT seconds.

DIRECTORY/NAME.json holds what was found. Exit code 0: nothing failed; 1: something did; 3: skipped.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
from pathlib import Path

import torch

from gpu_checks.report import Context, Report, SkippedError

SKIPPED = 3


def main(name: str, directory: str, device: str, tiny: str, limit: str) -> int:
    """The exit code."""
    faulthandler.enable()
    # Shortly before it is killed: where it hangs.
    faulthandler.dump_traceback_later(0.9 * float(limit))
    # As a run does: no TF32 in float32, which is what is compared.
    torch.set_float32_matmul_precision("highest")
    path = Path(directory)
    report = Report(path / f"{name}.json")
    module = importlib.import_module(f"gpu_checks.{name}")
    try:
        module.run(Context(torch.device(device), path, report, bool(int(tiny))))
    except SkippedError as reason:
        report.number("skipped", str(reason))
        return SKIPPED
    print(json.dumps(report.failures[:3]), flush=True)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
