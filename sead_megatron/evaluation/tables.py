"""Results as tables, laid out as the paper's Table 1: methods are rows, benchmarks are columns, the average is last.

One table of strings is shown by rich and written as Markdown. Torch-free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sead_megatron.evaluation.output import Output
from sead_megatron.evaluation.scores import compare, read_evaluated, scores
from sead_megatron.records import write_atomically


@dataclass(frozen=True)
class Grid:
    """A table of strings; the first column holds names, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For the screen."""
        table = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For a file; a line feed in a cell is a space there."""
        lines = [self.header, ["---", *["--:"] * (len(self.header) - 1)], *self.rows]
        table = "\n".join(
            "| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines
        )
        return f"{self.title}\n\n{table}\n"


def write_results(output: Output) -> list[Grid]:
    """Writes results.json and results.md of a finished evaluation, and returns its tables."""
    results = scores(read_evaluated(output))
    grids = [_methods([results]), _details(results)]
    _write(output.path, "results", results, grids)
    return grids


def compare_outputs(directories: Sequence[str], output: str | None) -> list[Grid]:
    """Tables of several output directories side by side, written as comparison.json and .md when `output` is given.

    Raises UserError for a directory without a finished evaluation, and as `scores.compare` does.
    """
    results = compare([read_evaluated(Output(Path(directory))) for directory in directories])
    grids = [_methods(results["methods"])]
    if len(directories) > 1:
        grids.append(_differences(results))
    if results["different_settings"]:
        grids.append(_settings(results))
    if output is not None:
        path = Path(output)
        path.mkdir(parents=True, exist_ok=True)
        _write(path, "comparison", results, grids)
    return grids


def show(grids: Sequence[Grid]) -> None:
    """Prints tables; as wide as their contents where nobody looks at a terminal."""
    console = Console(width=None if sys.stdout.isatty() else 250)
    for grid in grids:
        console.print(grid.rich())


def _write(path: Path, name: str, results: dict[str, Any], grids: Sequence[Grid]) -> None:
    write_atomically(path / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_atomically(path / f"{name}.md", "\n".join(grid.markdown() for grid in grids))


def _methods(results: Sequence[dict[str, Any]]) -> Grid:
    header, rows = ["Method"], []
    for name in results[0]["benchmarks"]:
        metrics = dict.fromkeys(method["benchmarks"][name]["metric"] for method in results)
        header.append(f"{name}\n{' / '.join(metrics)}")
    for method in results:
        cells = [*method["benchmarks"].values(), method["average"]]
        rows.append([method["name"], *(_percent(cell["score"], cell["interval"]) for cell in cells)])
    return Grid("Right answers, % [95 % interval]", [*header, "Avg."], rows)


def _differences(results: dict[str, Any]) -> Grid:
    first, *others = (method["name"] for method in results["methods"])
    rows = [
        [
            name,
            *(
                _points(cell["difference"], cell["interval"])
                for cell in [*difference["benchmarks"].values(), difference["average"]]
            ),
        ]
        for name, difference in zip(others, results["differences_to_first"], strict=True)
    ]
    title = f"Difference to {first}, percentage points [95 % interval, paired over problems]"
    return Grid(title, ["Method", *results["benchmarks"], "Avg."], rows)


def _settings(results: dict[str, Any]) -> Grid:
    names = [method["name"] for method in results["methods"]]
    different = results["different_settings"].items()
    rows = [[name, *(json.dumps(value) for value in values)] for name, values in different]
    return Grid("Not evaluated alike", ["Setting", *names], rows)


def _details(results: dict[str, Any]) -> Grid:
    benchmarks = results["benchmarks"]
    ks = sorted({int(k) for scored in benchmarks.values() for k in scored["pass_at"]})
    header = ["Benchmark", "problems", "samples", *(f"pass@{k}" for k in ks), "truncated", "tokens", "empty"]
    rows = []
    for name, scored in benchmarks.items():
        estimates = [scored["pass_at"].get(str(k)) for k in ks]
        rows.append(
            [
                name,
                str(scored["problems"]),
                str(scored["samples"]),
                *("" if e is None else _percent(e["value"], e["interval"]) for e in estimates),
                f"{scored['truncated']:.1%}",
                f"{scored['length_mean']:.1f}",
                str(scored["empty"]),
            ]
        )
    return Grid(
        "pass@k, % [95 % interval]; responses cut short, their mean length, without text", header, rows
    )


def _percent(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * value:.1f}\n[{100 * low:.1f}, {100 * high:.1f}]"


def _points(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * value:+.1f}\n[{100 * low:+.1f}, {100 * high:+.1f}]"
