"""SmolLM2-135M-Instruct on MATH-500 and AMC23, on the CPU: results, intervals and time.

    examples/smollm2/prepare.sh
    python benchmarks/smollm2_evaluation.py DATA benchmarks/results/smollm2_evaluation.json
    python benchmarks/smollm2_evaluation.py --table benchmarks/results/smollm2_evaluation.json

DATA holds MATH-500.parquet and AMC23.parquet. The work is `examples/smollm2/evaluate.sh`, which goes on where it was
stopped; the time is that of this command, and is given only for an evaluation that it did alone. `--table` prints a
Markdown table of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record_run import commit, machine

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "runs" / "smollm2_evaluation"
BENCHMARKS = ("MATH-500", "AMC23")


def measure(data: Path) -> dict[str, Any]:
    """Evaluates, and returns what `evaluate` wrote with time, commit and machine."""
    begun = OUTPUT.exists()
    files = [str((data / f"{name}.parquet").resolve()) for name in BENCHMARKS]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.monotonic()
    subprocess.run(["examples/smollm2/evaluate.sh", *files], cwd=ROOT, env=environment, check=True)
    seconds = round(time.monotonic() - started)
    results = json.loads((OUTPUT / "results.json").read_text(encoding="utf-8"))
    settings = results["evaluation"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "seconds": None if begun else seconds,
        "settings": {key: settings[key] for key in ("dtype", "seed", "instruction", "benchmarks")},
        "benchmarks": results["benchmarks"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| benchmark | problems | right | greedy pass@1, % [95 % interval] | cut at 512 tokens | mean length, tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        found = result["benchmarks"][name]
        low, high = found["interval"]
        lines.append(
            f"| {name} | {found['problems']} | {found['correct']} | {100 * found['score']:.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}] | {100 * found['truncated']:.1f} % | {found['length_mean']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    match sys.argv[1:]:
        case ["--table", path]:
            print(table(json.loads(Path(path).read_text(encoding="utf-8"))))
        case [data, output]:
            content = json.dumps(measure(Path(data)), indent=1)
            Path(output).write_text(content + "\n", encoding="utf-8")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
