"""What the runs of the ablation show: accuracies and differences with intervals, entropies, zones."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from cells import COMPONENTS
from scipy.stats import t as student_t
from task import expression_of, fork_positions, is_valid_solution

from sead_megatron.metrics import phase_seconds
from sead_megatron.records import read_records

Cells = dict[str, dict[int, float]]
"""One number of every run: by cell and seed."""
Estimate = dict[str, float]

LAST_STEPS = 5


def estimate(values: list[float], digits: int = 4) -> Estimate:
    """Mean and 95 % interval of Student's t over seeds; needs two values or more."""
    mean = fmean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return {
        "mean": round(mean, digits),
        "low": round(mean - half, digits),
        "high": round(mean + half, digits),
    }


def contrast(cells: Cells, weight: Callable[[str], float]) -> Estimate:
    """Interval of a weighted sum of the table's cells, formed within each seed.

    Runs of one seed share the order of their prompts where there is no curriculum, and all begin with the same student.
    """
    names = [name for name in cells if name.startswith("sead_") and weight(name)]
    seeds = sorted(cells[names[0]])
    return estimate([sum(weight(name) * cells[name][seed] for name in names) for seed in seeds])


def effects(cells: Cells) -> dict[str, Estimate]:
    """Main effects and interactions of the 2^3 table, and the excess of all three over the sum of each alone."""

    def sign(name: str, factor: int) -> int:
        return 1 if name.removeprefix("sead_")[factor] == "1" else -1

    found = {}
    for index, factor in enumerate(COMPONENTS):
        found[factor] = contrast(cells, lambda name, i=index: sign(name, i) / 4)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        found[f"{COMPONENTS[first]} x {COMPONENTS[second]}"] = contrast(
            cells, lambda name, i=first, j=second: sign(name, i) * sign(name, j) / 4
        )
    for index, factor in enumerate(COMPONENTS):
        alone = "sead_" + "".join("1" if i == index else "0" for i in range(3))
        found[f"{factor} alone"] = contrast(cells, lambda name, a=alone: (name == a) - (name == "sead_000"))
    found["all"] = contrast(cells, lambda name: (name == "sead_111") - (name == "sead_000"))
    excess = {"sead_111": 1, "sead_100": -1, "sead_010": -1, "sead_001": -1, "sead_000": 2}
    found["all - sum of each alone"] = contrast(cells, lambda name: excess.get(name, 0))
    return found


def differences(cells: Cells, reference: str) -> dict[str, Estimate]:
    """Each cell minus the reference, seed by seed."""
    return {
        name: estimate([values[seed] - cells[reference][seed] for seed in values])
        for name, values in cells.items()
        if name != reference
    }


def entropies_at_forks(directory: Path, steps: int) -> dict[str, float]:
    """Mean entropies of student and teacher, nats, at the true forks of the valid rollouts of the last steps."""
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(steps - LAST_STEPS + 1, steps + 1):
        lines = (directory / "rollouts" / f"step_{step}.jsonl").read_text(encoding="utf-8").splitlines()
        for rollout in map(json.loads, lines):
            expression = expression_of(rollout["prompt"][-1]["content"])
            if not rollout["finished"] or not is_valid_solution(expression, rollout["response"]):
                continue
            places = fork_positions(expression, rollout["response"])  # characters are tokens before the box
            for model in ("student", "teacher"):
                entropies = rollout.get(f"{model}_entropy")
                if entropies is not None:  # a run without a teacher has none of its
                    found[model] += [entropies[place] for place in places]
    return {f"forks/{model}": fmean(values) for model, values in found.items()}


def numbers(directory: Path) -> dict[str, float]:
    """One run's numbers. Means of the metrics are over the first and the last `LAST_STEPS` steps."""
    accuracy = {row["step"]: row["accuracy"] for row in read_records(directory / "evaluations.jsonl")}
    metrics = read_records(directory / "metrics.jsonl")
    steps = len(metrics)
    found = {
        "accuracy": accuracy[steps],
        "accuracy/before": accuracy[0],
        "accuracy/while_training": fmean(value for step, value in accuracy.items() if step),
        "seconds": sum(map(phase_seconds, metrics)),
        **entropies_at_forks(directory, steps),
    }
    for key in (
        "entropy/student",
        "entropy/teacher",
        "rollout/length_mean",
        "zone/b_fkl_share",
        "zone/c_fkl_share",
    ):
        for when, rows in (("first", metrics[:LAST_STEPS]), ("last", metrics[-LAST_STEPS:])):
            values = [row[key] for row in rows if key in row]
            if values:
                found[f"{key}/{when}"] = fmean(values)
    return found


def summarise(directories: dict[tuple[str, int], Path]) -> dict[str, object]:
    """The tables, from the directories of the finished runs by cell and seed."""
    runs = {key: numbers(directory) for key, directory in directories.items()}

    table: dict[str, Cells] = defaultdict(lambda: defaultdict(dict))
    for (name, seed), values in runs.items():
        for number, value in values.items():
            table[number][name][seed] = value
    accuracy, middle = table["accuracy"], table["accuracy/while_training"]
    return {
        "seeds": sorted({seed for _, seed in runs}),
        "cells": {
            name: {
                key: estimate(list(table[key][name].values())) for key in sorted(table) if name in table[key]
            }
            for name in accuracy
        },
        "effects": {"accuracy": effects(accuracy), "accuracy/while_training": effects(middle)},
        "minus_opd": {
            "accuracy": differences(accuracy, "sead_000"),
            "accuracy/while_training": differences(middle, "sead_000"),
        },
        "runs": [
            {"cell": name, "seed": seed, **{key: round(value, 4) for key, value in values.items()}}
            for (name, seed), values in runs.items()
        ],
    }
