"""What tools/prepare_data.py removes from DAPO-Math-17k against six benchmarks, and how long it takes.

    python benchmarks/data_preparation.py DIRECTORY benchmarks/results/data_preparation.json
    python benchmarks/data_preparation.py --table benchmarks/results/data_preparation.json

DIRECTORY holds dapo-math-17k.parquet and the benchmarks' files of the same kind. The table in docs/data.md is that of
the results.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record_run import commit, machine

SOURCE = "dapo-math-17k.parquet"
BENCHMARKS = ["AIME24", "AIME25", "AMC23", "MATH-500", "Minerva", "Olympiad-Bench"]


def measure(directory: Path) -> dict[str, Any]:
    """The content of the results file."""
    tool = Path(__file__).parents[1] / "tools/prepare_data.py"
    inputs = [SOURCE, *(f"{name}.parquet" for name in BENCHMARKS)]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "train.jsonl"
        paths = [str((directory / name).resolve()) for name in inputs]
        command = [sys.executable, str(tool), paths[0], str(out), "--benchmark", *paths[1:]]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        provenance = json.loads(out.with_name("train.jsonl.provenance.json").read_text())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": shlex.join(
            ["tools/prepare_data.py", inputs[0], "train.jsonl", "--benchmark", *inputs[1:]]
        ),
        "seconds": round(seconds, 1),
        "processor_seconds": round(
            used.ru_utime + used.ru_stime, 1
        ),  # what the clock says depends on the neighbours
        "peak_mib": used.ru_maxrss // 1024,
        **provenance,
    }


def table(content: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    counts = content["counts"]
    lines = ["| rows of DAPO-Math-17k | |", "| --- | ---: |", f"| read | {counts['rows']:,} |"]
    lines += [f"| removed: {reason} | {number:,} |" for reason, number in counts["removed"].items()]
    lines += [
        f"| written | {counts['written']:,} |",
        f"| of these: pairs that look alike with another answer | {counts['lookalikes kept']:,} |",
        f"| seconds of one CPU core | {content['processor_seconds']} |",
        f"| peak memory, MiB | {content['peak_mib']} |",
        "",
        "| benchmark | questions | found in the data |",
        "| --- | ---: | ---: |",
    ]
    for name, questions in counts["questions"].items():
        lines.append(f"| {Path(name).stem} | {questions['asked']} | {questions['found']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the tables of a results file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.results.read_text())))
        return 0
    if options.directory is None or not (options.directory / SOURCE).is_file():
        print(f"error: DIRECTORY: holds no {SOURCE}", file=sys.stderr)
        return 2
    content = measure(options.directory)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
