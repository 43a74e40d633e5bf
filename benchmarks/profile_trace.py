"""Keep what a profiled run showed: the summary of its traces with date, commit and machine, as JSON.

    python -m sead_megatron train examples/quickstart/config.yaml run_dir=runs/profiled steps=6 \\
        "profile={start_step: 3, stop_step: 5, ranks: [0, 1]}" --nproc-per-node 2
    python benchmarks/profile_trace.py runs/profiled benchmarks/results/profile_quickstart.json
    python benchmarks/profile_trace.py --table benchmarks/results/profile_quickstart.json  # as in docs/profiling.md
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record_run import commit, machine

from sead_megatron.errors import UserError
from sead_megatron.profiling import DIRECTORY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))


def measure(run_dir: Path) -> dict[str, Any]:
    """The content of the results file. Raises UserError for a run without traces."""
    from summarise_trace import read_ranges, summary

    traces = sorted((run_dir / DIRECTORY).glob("rank_*.json.gz"))
    if not traces:
        raise UserError("RUN_DIR", str(run_dir), "has no trace", "profile some steps (docs/profiling.md)")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "summaries": {trace.name: summary(read_ranges(trace)) for trace in traces},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables of a results file")
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_DIR RESULTS, or RESULTS")
    options = parser.parse_args()
    if options.table:
        for name, lines in json.loads(options.paths[0].read_text())["summaries"].items():
            print("\n".join([f"`{name}`:", "", *lines, ""]))
        return 0
    if len(options.paths) != 2:
        parser.error("RUN_DIR and RESULTS are needed")
    try:
        content = measure(options.paths[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.paths[1].write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
