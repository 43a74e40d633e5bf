"""Records of an output directory -> scores with intervals, and differences between directories. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sead_megatron.errors import UserError
from sead_megatron.evaluation.estimators import (
    Floats,
    average_interval,
    pass_at_k,
    pass_ks,
    percentile_interval,
    resampled_means,
    sample_means,
    wilson,
)
from sead_megatron.evaluation.graded import Graded, summary
from sead_megatron.evaluation.output import Output


@dataclass(frozen=True)
class Evaluated:
    """A finished output directory."""

    name: str
    """The directory's, which is the method's in tables."""
    settings: dict[str, Any]
    records: dict[str, list[Graded]]
    """Benchmark -> its problems in order."""

    def means(self, benchmark: str) -> Floats:
        """Each problem's share of right responses, [problems]."""
        return sample_means([record.correct for record in self.records[benchmark]])

    def metric(self, benchmark: str) -> str:
        """`greedy` or `avg@N`."""
        asked = self.settings["benchmarks"][benchmark]
        return "greedy" if asked["temperature"] == 0 else f"avg@{asked['samples']}"


def read_evaluated(output: Output) -> Evaluated:
    """Raises UserError when there is no evaluation, or an unfinished one."""
    settings = output.settings()
    records = {}
    for name, asked in settings["benchmarks"].items():
        records[name] = output.records(name)
        if len(records[name]) != asked["problems"]:
            raise UserError(
                str(output.path),
                None,
                f"{name} is not finished: {len(records[name])} of {asked['problems']} problems",
                "give the command that began it again",
            )
    return Evaluated(output.path.resolve().name, settings, records)


def scores(evaluated: Evaluated) -> dict[str, Any]:
    """The content of results.json: shares are in [0, 1], lengths in tokens."""
    benchmarks = {name: _benchmark_scores(evaluated, name) for name in evaluated.records}
    means = {name: evaluated.means(name) for name in evaluated.records}
    return {
        "name": evaluated.name,
        "evaluation": evaluated.settings,
        "benchmarks": benchmarks,
        "average": {
            "score": float(np.mean([scored["score"] for scored in benchmarks.values()])),
            "interval": average_interval(means),
        },
    }


def _benchmark_scores(evaluated: Evaluated, name: str) -> dict[str, Any]:
    records = evaluated.records[name]
    samples = evaluated.settings["benchmarks"][name]["samples"]
    counts = [sum(record.correct) for record in records]
    ks = pass_ks(samples)
    # Columns: avg@n, then pass@k.
    values = np.array([[c / samples, *(pass_at_k(samples, c, k) for k in ks)] for c in counts])
    means = resampled_means(name, values)
    intervals = [percentile_interval(column) for column in means.T]
    if samples == 1:
        intervals = [wilson(sum(counts), len(records))] * len(intervals)
    return {
        **summary(records),
        "metric": evaluated.metric(name),
        "interval": intervals[0],
        "interval_method": "wilson" if samples == 1 else "bootstrap",
        "pass_at": {
            str(k): {"value": float(values[:, i].mean()), "interval": intervals[i]}
            for i, k in enumerate(ks, start=1)
        },
    }


def compare(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Scores of the benchmarks that all methods have, and paired differences of each method to the first.

    Raises UserError: no common benchmark, or one with other problems.
    """
    first = methods[0]
    common = [name for name in first.records if all(name in method.records for method in methods)]
    if not common:
        names = ", ".join(first.records)
        raise UserError(
            "--compare", [m.name for m in methods], f"no benchmark of {first.name} ({names}) is in all of them",
            "evaluate the same benchmarks",
        )  # fmt: skip
    for method in methods[1:]:
        for name in common:
            _check_same_problems(first, method, name)
    results = [_restricted(scores(method), method, common) for method in methods]
    differences = [
        _differences({name: method.means(name) - first.means(name) for name in common})
        for method in methods[1:]
    ]
    return {
        "benchmarks": common,
        "methods": results,
        "differences_to_first": differences,
        "different_settings": _different_settings([method.settings for method in methods], common),
    }


def _different_settings(settings: Sequence[dict[str, Any]], common: Sequence[str]) -> dict[str, list[Any]]:
    """Setting -> its value for each method, where they were not evaluated alike; the model is meant to differ."""
    flat = [
        {key: value for key, value in method.items() if not key.startswith("model") and key != "benchmarks"}
        | {f"{name} {key}": value for name in common for key, value in method["benchmarks"][name].items()}
        for method in settings
    ]
    return {
        key: [one.get(key) for one in flat]
        for key in flat[0]
        # Keeping the text changes no number.
        if any(one.get(key) != flat[0][key] for one in flat) and not key.endswith("save_text")
    }


def _restricted(scored: dict[str, Any], method: Evaluated, common: Sequence[str]) -> dict[str, Any]:
    """The average is over the common benchmarks; what else a method has stays out."""
    means = {name: method.means(name) for name in common}
    average = {
        "score": float(np.mean([scored["benchmarks"][name]["score"] for name in common])),
        "interval": average_interval(means),
    }
    return scored | {
        "benchmarks": {name: scored["benchmarks"][name] for name in common},
        "average": average,
    }


def _differences(values: Mapping[str, Floats]) -> dict[str, Any]:
    """`values`: benchmark -> difference of each problem. Resampled per problem, hence paired."""
    by_benchmark = {
        name: {
            "difference": float(column.mean()),
            "interval": percentile_interval(resampled_means(name, column[:, None])[:, 0]),
        }
        for name, column in values.items()
    }
    return {
        "benchmarks": by_benchmark,
        "average": {
            "difference": float(np.mean([column.mean() for column in values.values()])),
            "interval": average_interval(values),
        },
    }


def _check_same_problems(first: Evaluated, other: Evaluated, benchmark: str) -> None:
    ours, theirs = (
        [(record.id, record.answer) for record in method.records[benchmark]] for method in (first, other)
    )
    if ours != theirs:
        raise UserError(
            "--compare",
            [first.name, other.name],
            f"{benchmark} has other problems in them ({len(ours)} and {len(theirs)})",
            "evaluate the same file with the same --limit",
        )
