"""Counts over prepared rows, and how they look on a terminal."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

_KINDS = (
    ("integer", re.compile(r"[-+]?\d+")),
    ("decimal", re.compile(r"[-+]?\d*\.\d+")),
    ("fraction", re.compile(r"[-+]?(?:\d+/\d+|\\[dt]?frac\{-?\d+\}\{-?\d+\})")),
    ("choice", re.compile(r"\(?[A-E]\)?")),
    ("formula", re.compile(r".*[\\=^_{}()\[\]<>+*/\d].*", re.DOTALL)),
)


def answer_kind(answer: str | None) -> str:
    """`integer`, `decimal`, `fraction`, `choice` (A to E), `formula`, `words` or `none`."""
    if answer is None:
        return "none"
    text = answer.strip().removeprefix("\\boxed{").strip("$ ")
    if answer.strip().startswith("\\boxed{"):
        text = text.removesuffix("}")
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(text)), "words")


def statistics(rows: Sequence[dict[str, Any]], problems: Sequence[str]) -> dict[str, Any]:
    """Of the rows of an output and of the texts of their problems, in the same order; lengths are characters."""
    lengths = sorted(map(len, problems))
    quantiles = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    return {
        "problem characters": {
            name: lengths[max(0, math.ceil(share * len(lengths)) - 1)] for name, share in quantiles.items()
        },
        "answers": _counted(answer_kind(row.get("answer")) for row in rows),
        "domains": _counted(row.get("domain", "none") for row in rows),
        "messages": _counted(str(len(row["messages"])) for row in rows),
        "solutions": sum("solution" in row for row in rows),
        "turns": sum("turns" in row for row in rows),
    }


def table(provenance: dict[str, Any]) -> Table:
    """What happened to the rows, and what those that are left look like."""
    counts, found = provenance["counts"], provenance["statistics"]
    shown = Table("rows", "", box=None)
    shown.add_row("read", f"{counts['rows']:,}")
    for reason, number in counts["removed"].items():
        shown.add_row(f"  {reason}", f"-{number:,}" if number else "0")
    shown.add_row("written", f"{counts['written']:,}", style="bold")
    shown.add_row("look alike, other answer (kept)", f"{counts['lookalikes kept']:,}")
    for name, benchmark in counts["questions"].items():
        shown.add_row(f"questions of {name} found", f"{benchmark['found']:,} of {benchmark['asked']:,}")
    for name in ("problem characters", "answers", "domains", "messages"):
        shown.add_row(name, ", ".join(f"{key} {value:,}" for key, value in found[name].items()))
    shown.add_row("with a solution", f"{found['solutions']:,}")
    shown.add_row("with turns", f"{found['turns']:,}")
    return shown


def _counted(values: Any) -> dict[str, int]:
    """The most frequent first; equal ones by name."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
