"""The table printed at the end of a run, from the files in RUN_DIR alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sead_megatron.config.load import load_config
from sead_megatron.errors import UserError
from sead_megatron.metrics import METRICS, PHASES
from sead_megatron.records import read_records
from sead_megatron.run_directory import RunDirectory

Row = tuple[str, str]


def summary_rows(run_dir: Path) -> list[Row]:
    """What the run did, as (quantity, value); a quantity that was not measured has no row.

    Raises UserError when `run_dir` holds no run or no finished step.
    """
    run = RunDirectory(run_dir)
    config = load_config(run.config_path)
    records = read_records(run.metrics_path)
    if not records:
        raise UserError(str(run.metrics_path), None, "holds no finished step", "train first")
    rows: list[Row] = [
        ("student", config.student.path),
        ("teacher", config.teacher.label),
        ("objective", config.objective.name),
        ("steps", f"{records[-1]['step']} of {config.steps}"),
    ]
    if skipped := records[-1].get("skipped_steps"):
        rows.append(("skipped steps", f"{skipped:.0f}"))
    evaluations = read_records(run.evaluations_path)
    rows += _accuracy_rows(evaluations) + _benchmark_rows(evaluations)
    for key in ("loss", "entropy/student", "entropy/teacher", "kl/forward", "kl/reverse"):
        values = _values(records, key)
        if values:
            rows.append(
                (f"{key}, first -> last step", f"{values[0]:.4f} -> {values[-1]:.4f} {METRICS[key].unit}")
            )
    rows += _zone_row(records, "_share", "zones A / B / C, share of tokens")
    rows += _zone_row(records, "_fkl_share", "zones A / B / C, share of forward KL")
    for key, name in (
        ("rollout/logprob_diff_max", "engine - trainer logprob, max"),
        ("entropy/engine_trainer_diff_max", "engine - trainer entropy, max"),
    ):
        if values := _values(records, key):
            rows.append((name, f"{max(values):.2e} nats"))
    return rows + _time_rows(records) + [("run directory", str(run_dir))]


def summary_table(run_dir: Path) -> Table:
    """`summary_rows` as a rich table. Raises UserError as it does."""
    table = Table(title="Summary", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in summary_rows(run_dir):
        table.add_row(*row)
    return table


def _values(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _accuracy_rows(evaluations: Sequence[dict[str, Any]]) -> list[Row]:
    ordered = sorted(
        (evaluation for evaluation in evaluations if "accuracy" in evaluation),
        key=lambda evaluation: int(evaluation["step"]),
    )
    if not ordered:
        return []
    rows = [("held-out greedy accuracy, before", _accuracy(ordered[0]))] if ordered[0]["step"] == 0 else []
    if ordered[-1]["step"] > 0:
        rows.append((f"held-out greedy accuracy, step {ordered[-1]['step']}", _accuracy(ordered[-1])))
    return rows


def _benchmark_rows(evaluations: Sequence[dict[str, Any]]) -> list[Row]:
    """First and last pass rate of each benchmark."""
    scores: dict[str, list[tuple[int, float]]] = {}
    for evaluation in sorted(evaluations, key=lambda evaluation: int(evaluation["step"])):
        for name, result in evaluation.get("benchmarks", {}).items():
            scores.setdefault(name, []).append((evaluation["step"], result["score"]))
    return [
        (f"{name}, step {known[0][0]} -> {known[-1][0]}", f"{known[0][1]:.1%} -> {known[-1][1]:.1%}")
        for name, known in scores.items()
    ]


def _accuracy(evaluation: dict[str, Any]) -> str:
    text = f"{evaluation['accuracy']:.1%} ({evaluation['correct']} of {evaluation['total']})"
    return text + (f", {evaluation['truncated']} truncated" if evaluation.get("truncated") else "")


def _zone_row(records: Sequence[dict[str, Any]], suffix: str, name: str) -> list[Row]:
    means = []
    for zone in "abc":
        values = _values(records, f"zone/{zone}{suffix}")
        if not values:
            return []
        means.append(sum(values) / len(values))
    return [(name, " / ".join(f"{mean:.1%}" for mean in means))]


def _time_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    sums = {phase: sum(_values(records, f"time/{phase}")) for phase in PHASES}
    total = sum(sums.values())
    return [
        (f"time, {phase}", f"{seconds:,.1f} s ({seconds / total:.1%})")
        for phase, seconds in sums.items()
        if seconds
    ]
