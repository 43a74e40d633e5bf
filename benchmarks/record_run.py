"""Keep what a run showed: its summary with date, commit and machine, as JSON.

    python benchmarks/record_run.py runs/quickstart benchmarks/results/quickstart.json

The tables in the READMEs are copied from these files.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml

from sead_megatron.errors import UserError
from sead_megatron.metrics import phase_seconds
from sead_megatron.records import read_records
from sead_megatron.summary import summary_rows


def machine() -> dict[str, object]:
    """Processor and cores, as the operating system names them."""
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {"cpu": ", ".join(sorted(names)), "cores": os.cpu_count(), "python": platform.python_version()}


def commit() -> str:
    """The checked-out commit, with `+changes` when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def record(run_dir: Path) -> dict[str, object]:
    """Summary, evaluations and the sum of the phases' times. UserError when the run has no finished step."""
    rows = dict(summary_rows(run_dir))
    rows.pop("run directory")
    metrics = read_records(run_dir / "metrics.jsonl")
    seconds = sum(map(phase_seconds, metrics))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "config": yaml.safe_load((run_dir / "config.yaml").read_text()),
        "summary": rows,
        "evaluations": read_records(run_dir / "evaluations.jsonl"),
        "seconds_in_phases": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    try:
        content = record(options.run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
