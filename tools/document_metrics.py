"""The table of docs/metrics.md, from the code that refuses a metric that is not in it.

python tools/document_metrics.py            # prints the table
python tools/document_metrics.py --write    # puts it into docs/metrics.md
"""

import argparse
import sys
from pathlib import Path

from sead_megatron.metrics import METRICS

DOCUMENT = Path(__file__).parents[1] / "docs/metrics.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """Every key of metrics.jsonl, in the order of the code."""
    lines = ["| key | unit | meaning | same in two equal runs |", "|---|---|---|---|"]
    for metric in METRICS.values():
        meaning = metric.meaning.replace("|", "\\|")
        same = "yes" if metric.deterministic else "no"
        lines.append(f"| `{metric.name}` | {metric.unit or '–'} | {meaning} | {same} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The document with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    else:
        print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
