"""Time per range of a trace that a profiled run wrote on the CPU (see docs/profiling.md).

    python tools/summarise_trace.py RUN_DIR/profile/rank_0_steps_2_4.json.gz
    python tools/summarise_trace.py TRACE --each update/forward

Prints a Markdown table. A range is named by where it is made, without its number: `update/forward` are the forward
passes of all microbatches of all steps in the trace. `self` is the time of a range outside the ranges inside it,
`share` that of the steps' time. `--each` lists the ranges of one name one by one.
"""

import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_megatron.errors import UserError
from sead_megatron.metrics import PHASES

# Torch marks ranges of its own in the same way, for example `Optimizer.step#Adam.step`.
_OURS = re.compile(rf"step/\d+|(?:{'|'.join(PHASES)})(?:/[a-z-]+(?:/\d+)?)?")


@dataclass
class Range:
    """One range; times in milliseconds."""

    name: str
    start: float
    duration: float
    inner: float = 0.0
    """Time of the ranges directly inside."""

    @property
    def group(self) -> str:
        """The name without its number."""
        return re.sub(r"/\d+$", "", self.name)

    @property
    def end(self) -> float:
        return self.start + self.duration


def read_ranges(path: Path) -> list[Range]:
    """Our ranges in the order of their start, those that begin together from the outside in. Raises UserError."""
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(str(path), None, f"cannot be read ({reason})", "give a trace of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), None, "is no trace", "give RUN_DIR/profile/rank_*.json.gz") from error
    ranges = [_range(event) for event in events if _is_ours(event)]
    if not ranges:
        raise UserError(str(path), None, "holds no range of a step", "give RUN_DIR/profile/rank_*.json.gz")
    ranges.sort(key=lambda one: (one.start, -one.duration))
    _subtract_inner(ranges)
    return ranges


def _is_ours(event: dict[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and _OURS.fullmatch(event["name"]) is not None


def _range(event: dict[str, Any]) -> Range:
    return Range(event["name"], event["ts"] / 1000, event["dur"] / 1000)


def _subtract_inner(ranges: Sequence[Range]) -> None:
    """Fills in `inner`: ranges nest, and all are of one thread."""
    around: list[Range] = []
    for one in ranges:
        while around and around[-1].end <= one.start:
            around.pop()
        if around:
            around[-1].inner += one.duration
        around.append(one)


def summary(ranges: Sequence[Range]) -> list[str]:
    """A row for each group, in the order of their first appearance."""
    groups: dict[str, list[Range]] = defaultdict(list)
    for one in ranges:
        groups[one.group].append(one)
    whole = sum(one.duration for one in ranges if one.group == "step")
    lines = ["| range | number | total, ms | share | self, ms | mean, ms | longest, ms |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, members in groups.items():
        total = sum(one.duration for one in members)
        alone = sum(one.duration - one.inner for one in members)
        longest = max(one.duration for one in members)
        share = f"{total / whole:.1%}" if whole else "–"
        lines.append(
            f"| {name} | {len(members)} | {total:.1f} | {share} | {alone:.1f} | {total / len(members):.2f} "
            f"| {longest:.2f} |"
        )
    return lines


def each(ranges: Sequence[Range], group: str) -> list[str]:
    """A row for each range of a group. Raises UserError for an unknown one."""
    members = [one for one in ranges if one.group == group]
    if not members:
        known = ", ".join(dict.fromkeys(one.group for one in ranges))
        raise UserError("--each", group, "not a range of this trace", f"use one of {known}")
    began = ranges[0].start
    lines = ["| range | begins at, ms | ms | self, ms |", "|---|---:|---:|---:|"]
    for one in members:
        alone = one.duration - one.inner
        lines.append(f"| {one.name} | {one.start - began:.2f} | {one.duration:.2f} | {alone:.2f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--each", metavar="RANGE", help="list the ranges of this name one by one")
    arguments = parser.parse_args(argv)
    try:
        ranges = read_ranges(arguments.trace)
        print("\n".join(summary(ranges) if arguments.each is None else each(ranges, arguments.each)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
