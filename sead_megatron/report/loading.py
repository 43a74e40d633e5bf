"""What runs left on disk, as far as it can be read, and what is missing from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from sead_megatron.config import TrainConfig, load_config
from sead_megatron.errors import UserError
from sead_megatron.records import read_records
from sead_megatron.run_directory import RunDirectory

ROLLOUT_BYTES = 64 * 2**20
"""Rollout files of a run are read up to this size together: those of evenly spaced steps."""
_ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl")

T = TypeVar("T")
Column = list[float | None]
"""One number a response token, in nats; None where it was not finite."""


class SampledRollout(BaseModel):
    """One line of `rollouts/step_N.jsonl` (see `training/step_metrics.py`); a column that was not measured is None.

    Columns and `zones` have one entry a response token.
    """

    prompt_id: str = ""
    prompt: list[dict[str, str]] = []
    answer: str | None = None
    reward: float | None = None
    finished: bool = True
    tokens: list[int]
    token_texts: list[str]
    zones: str | None = None
    logprobs: Column | None = None
    student_entropy: Column | None = None
    teacher_entropy: Column | None = None
    forward_kl: Column | None = None
    reverse_kl: Column | None = None

    @model_validator(mode="after")
    def _one_entry_a_token(self) -> SampledRollout:
        for name in ("token_texts", "zones", *COLUMNS):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.tokens):
                raise ValueError(f"{name} has {len(value)} entries for {len(self.tokens)} tokens")
        if self.zones is not None and not set(self.zones) <= set("ABC"):
            raise ValueError("zones must be A, B or C")
        return self


COLUMNS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "logprobs")


@dataclass(frozen=True)
class Run:
    """One run. `rollouts` are by step, `rollout_steps` are all that are on disk; `gaps` say what is missing."""

    name: str
    path: Path
    config: TrainConfig
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    rollouts: dict[int, list[SampledRollout]]
    rollout_steps: list[int]
    gaps: list[str]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have a finite number under `key`, and these numbers."""
        pairs = [(int(record["step"]), number(record, key)) for record in self.metrics]
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def at(self, step: int, key: str) -> float | None:
        """The number under `key` of one step, if it is there and finite."""
        return next((number(record, key) for record in self.metrics if record["step"] == step), None)


def number(record: dict[str, Any], key: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs, each under the name of its directory, or under the part of the path that tells them apart.

    Raises UserError for a directory without a run and for files that no kill explains.
    """
    resolved = [path.resolve() for path in run_dirs]
    if twice := [
        str(path) for path, full in zip(run_dirs, resolved, strict=True) if resolved.count(full) > 1
    ]:
        raise UserError("RUN_DIR", twice[0], "is given twice", "give each run once")
    return [_load(path, name) for path, name in zip(run_dirs, distinct_names(resolved), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last component of each of some different paths, or what is left without the components that all share.

    `runs/sead/seed_1` and `runs/opd/seed_1` are `sead` and `opd`.
    """
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [path.parts for path in paths]
    leading = _shared(parts)
    trailing = _shared([part[leading:][::-1] for part in parts])
    names = ["/".join(part[leading : len(part) - trailing]) for part in parts]
    return names if all(names) else [str(path) for path in paths]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many components all begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _load(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    if not directory.config_path.is_file():
        reason = "holds no run (no config.yaml)" if path.is_dir() else "no such directory"
        raise UserError("RUN_DIR", str(path), reason, "give the run_dir of a run")
    config = load_config(directory.config_path)
    metrics = read_records(directory.metrics_path)
    evaluations = sorted(read_records(directory.evaluations_path), key=lambda record: int(record["step"]))
    gaps: list[str] = []
    rollout_steps = _rollout_steps(directory.rollouts_path)
    read = _affordable(directory.rollouts_path, rollout_steps)
    rollouts = {step: _read_rollouts(directory.rollouts_path / f"step_{step}.jsonl", gaps) for step in read}
    rollouts = {step: records for step, records in rollouts.items() if records}
    run = Run(name, path, config, metrics, evaluations, rollouts, rollout_steps, gaps)
    gaps += _gaps(run)
    if len(read) < len(rollout_steps):
        gaps.append(f"Rollouts of {len(read)} of {len(rollout_steps)} steps are read: the files are large.")
    return run


def _rollout_steps(directory: Path) -> list[int]:
    files = list(directory.iterdir()) if directory.is_dir() else []
    return sorted(int(match[1]) for file in files if (match := _ROLLOUT_FILE.fullmatch(file.name)))


def _affordable(directory: Path, steps: list[int]) -> list[int]:
    """Evenly spaced steps, with the first and the last, whose files are at most ROLLOUT_BYTES together."""
    return within(steps, lambda step: (directory / f"step_{step}.jsonl").stat().st_size, ROLLOUT_BYTES)


def within(items: Sequence[T], size: Callable[[T], int], budget: int) -> list[T]:
    """As many evenly spaced items as fit into the budget (about: the search goes in steps of a tenth), at least one."""
    count = len(items)
    while count > 1 and sum(map(size, evenly(items, count))) > budget:
        count = count * 9 // 10
    return evenly(items, count)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, with the first and the last (count 1: the last)."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[-1:]) if count == 1 else []
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _read_rollouts(path: Path, gaps: list[str]) -> list[SampledRollout]:
    records = []
    for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(SampledRollout.model_validate_json(line))
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            gaps.append(f"rollouts/{path.name}, line {line_number} is left out: {reason}.")
    return records


def _gaps(run: Run) -> list[str]:
    gaps = []
    steps = len(run.metrics)
    if not steps:
        gaps.append("metrics.jsonl holds no finished step.")
    elif run.metrics[-1]["step"] < run.config.steps:
        gaps.append(f"The run stands at step {run.metrics[-1]['step']} of {run.config.steps}.")
    if not run.evaluations:
        gaps.append("evaluations.jsonl holds no evaluation (evaluation.prompts sets the held-out prompts).")
    if not run.rollout_steps:
        gaps.append("There are no sampled rollouts (metrics.rollout_samples sets how many).")
    elif not any(r.forward_kl for records in run.rollouts.values() for r in records):
        gaps.append("No rollout has per-token KLs (metrics.full_stats_every measures them).")
    broken = [r["step"] for r in run.metrics if "loss" in r and number(r, "loss") is None]
    if broken:
        gaps.append(f"The loss was not finite in {len(broken)} steps, first in step {broken[0]}.")
    return gaps
