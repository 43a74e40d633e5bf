"""The tables of docs/ablation.md.

python benchmarks/ablation/table.py benchmarks/results/ablation.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cells import COMPONENTS, METHODS

PAPER = {
    "000": 0.0,
    "100": 0.32,
    "010": 0.22,
    "001": 4.20,
    "110": 4.52,
    "101": 4.24,
    "011": 4.79,
    "111": 4.82,
}
"""Table 2 of the paper: average accuracy minus OPD's, points, by zones, annealing, curriculum."""


def percent(value: dict[str, float], *, signed: bool = False) -> str:
    """Mean and interval, in percent or points."""
    sign = "+" if signed else ""
    mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def nats(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.3f}"


def factorial_table(result: dict[str, Any]) -> list[str]:
    """The paper's Table 2."""
    lines = [
        "| zones | annealing | curriculum | accuracy, % | minus OPD | steps 10 to 30, minus OPD | paper, minus OPD |",
        "|---|---|---|---|---|---|---|",
    ]
    minus = result["minus_opd"]
    for switches, paper in PAPER.items():
        name = f"sead_{switches}"
        marks = " | ".join("x" if switch == "1" else "" for switch in switches)
        change = percent(minus["accuracy"][name], signed=True) if name in minus["accuracy"] else ""
        early = (
            percent(minus["accuracy/while_training"][name], signed=True) if name in minus["accuracy"] else ""
        )
        accuracy = percent(result["cells"][name]["accuracy"])
        lines.append(f"| {marks} | {accuracy} | {change} | {early} | {paper:+.2f} |")
    return lines


def effects_table(result: dict[str, Any]) -> list[str]:
    """Effects and interactions; the paper's from its Table 2 by the same sums."""

    def of_paper(name: str) -> float | None:
        if name == "all":
            return PAPER["111"]
        if name == "all - sum of each alone":
            return PAPER["111"] - PAPER["100"] - PAPER["010"] - PAPER["001"]
        factors = [COMPONENTS.index(part) for part in name.removesuffix(" alone").split(" x ")]
        if name.endswith(" alone"):
            return PAPER["".join("1" if index == factors[0] else "0" for index in range(3))]
        total = 0.0
        for switches, value in PAPER.items():
            sign = 1
            for factor in factors:
                sign *= 1 if switches[factor] == "1" else -1
            total += sign * value / 4
        return total

    lines = [
        "| effect | final accuracy, points | mean of steps 10 to 30, points | paper, points |",
        "|---|---|---|---|",
    ]
    for name, value in result["effects"]["accuracy"].items():
        early = result["effects"]["accuracy/while_training"][name]
        lines.append(
            f"| {name} | {percent(value, signed=True)} | {percent(early, signed=True)} | {of_paper(name):+.2f} |"
        )
    return lines


def methods_table(result: dict[str, Any]) -> list[str]:
    """SEAD and the other objectives."""
    lines = [
        "| method | learning rate | accuracy, % | minus OPD |",
        "|---|---|---|---|",
    ]
    rates = {cell_of(method, result): (method, result["learning_rate"][method]) for method in METHODS}
    if "sead_111" not in rates:  # SEAD did better at another learning rate in the validation
        rates["sead_111"] = ("sead, at the rate of opd", result["learning_rate"]["opd"])
    for name, (method, rate) in rates.items():
        cell = result["cells"][name]
        minus = result["minus_opd"]["accuracy"].get(name)
        change = "" if minus is None else percent(minus, signed=True)
        lines.append(f"| {method} | {rate:g} | {percent(cell['accuracy'])} | {change} |")
    return lines


def entropy_table(result: dict[str, Any]) -> list[str]:
    """Entropies of the rollouts, and at their true forks."""
    lines = [
        "| runs | student, first 5 steps | last 5 | teacher, last 5 | student at forks | teacher at forks |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in result["cells"].items():
        keys = (
            "entropy/student/first",
            "entropy/student/last",
            "entropy/teacher/last",
            "forks/student",
            "forks/teacher",
        )
        lines.append(f"| {name} | " + " | ".join(nats(cell.get(key)) for key in keys) + " |")
    return lines


def cell_of(method: str, result: dict[str, Any]) -> str:
    """The cell with the runs of a method: OPD's, and SEAD's at OPD's learning rate, are cells of the 2^3 table."""
    if method in result["cells"]:
        return method
    return {"opd": "sead_000", "sead": "sead_111"}[method]


def zones_table(result: dict[str, Any]) -> list[str]:
    """Share of the forward KL in the zones B and C, which hold half of the tokens."""
    lines = ["| runs | B, first 5 steps | C | B, last 5 steps | C |", "|---|---|---|---|---|"]
    for name, cell in result["cells"].items():
        keys = [f"zone/{zone}_fkl_share/{when}" for when in ("first", "last") for zone in ("b", "c")]
        if all(key in cell for key in keys):
            lines.append(
                f"| {name} | " + " | ".join(f"{100 * cell[key]['mean']:.1f} %" for key in keys) + " |"
            )
    return lines


def self_teacher_table(result: dict[str, Any]) -> list[str]:
    """What OPSD's student and teacher say where the student adds two factors instead of multiplying them."""
    lines = [
        "| the rollout's product | number | student: product | sum | teacher: product | sum | the shown character |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("student, product", "student, sum", "teacher, product", "teacher, sum", "teacher, shown")
    for kind, found in result["self_teacher"].items():
        shares = (f"{100 * found[key]:.1f} %" if key in found else "" for key in keys)
        lines.append(f"| {kind} | {found['products']} | " + " | ".join(shares) + " |")
    return lines


TABLES = {
    "factorial": factorial_table,
    "effects": effects_table,
    "methods": methods_table,
    "self_teacher": self_teacher_table,
    "entropy": entropy_table,
    "zones": zones_table,
}


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n\n".join("\n".join(table(result)) for table in TABLES.values()))


if __name__ == "__main__":
    main()
