"""One self-contained HTML page about one run or several: `python -m sead_megatron report RUN_DIR ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sead_megatron.errors import UserError
from sead_megatron.records import write_atomically
from sead_megatron.report.loading import load_runs
from sead_megatron.report.page import render

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], output: Path | None) -> Path:
    """Write the page about these runs; where it is. Without `output`: RUN_DIR/report.html of the only run.

    Raises UserError for a directory that holds no run, a damaged file, and an output that cannot be written.
    """
    if output is None and len(run_dirs) > 1:
        raise UserError("--output", None, f"{len(run_dirs)} runs have no common directory", "name a file")
    runs = load_runs(run_dirs)
    path = run_dirs[0] / "report.html" if output is None else output
    try:
        write_atomically(path, render(runs))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            "--output", str(path), f"cannot be written ({reason})", "name another file"
        ) from error
    return path
