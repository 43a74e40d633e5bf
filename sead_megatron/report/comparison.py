"""Several runs side by side: what each is, what it reached, and how far that is from the first run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sead_megatron.config import TrainConfig
from sead_megatron.evaluation.estimators import Interval, wilson
from sead_megatron.metrics import phase_seconds, training_seconds
from sead_megatron.objectives.opd import OpdObjective
from sead_megatron.objectives.sead import SeadObjective
from sead_megatron.report.loading import Run, number
from sead_megatron.report.statistics import newcombe


@dataclass(frozen=True)
class Components:
    """The columns of the paper's Table 2."""

    token_zones: bool
    annealing: bool
    curriculum: bool


def components(config: TrainConfig) -> Components:
    """Which of SEAD's three parts a configuration has."""
    objective = config.objective
    return Components(
        token_zones=isinstance(objective, SeadObjective) and objective.token_zones,
        annealing=isinstance(objective, SeadObjective) and objective.annealing,
        curriculum=config.curriculum.name != "uniform",
    )


def method_name(config: TrainConfig) -> str:
    """The method as the paper's tables name it; other objectives by their own names."""
    parts, objective = components(config), config.objective
    full = isinstance(objective, OpdObjective) and objective.form == "full"
    if not full and not isinstance(objective, SeadObjective):
        name = "OPD (RKL k=1)" if objective.name == "opd" else objective.name.upper()
        return f"{name} + Curriculum" if parts.curriculum else name
    names = {
        "Token Zones": parts.token_zones,
        "KL Annealing": parts.annealing,
        "Curriculum": parts.curriculum,
    }
    if all(names.values()):
        return "SEAD (full)"
    active = [name for name, is_on in names.items() if is_on]
    base = [] if parts.token_zones or parts.annealing else ["OPD (RKL)"]
    text = " + ".join(base + active)
    return f"{text} only" if len(active) == 1 and not base else text


@dataclass(frozen=True)
class Evaluated:
    """One held-out evaluation; `counts` are correct and total, None where the record lacks them."""

    step: int
    accuracy: float
    counts: tuple[int, int] | None

    @property
    def interval(self) -> Interval | None:
        """Wilson's, where the counts are known."""
        return None if self.counts is None else wilson(*self.counts)


def evaluated(run: Run) -> list[Evaluated]:
    """The evaluations that have an accuracy, by step."""
    found = []
    for record in run.evaluations:
        accuracy, correct, total = (number(record, key) for key in ("accuracy", "correct", "total"))
        if accuracy is None:
            continue
        counts = None if correct is None or not total else (int(correct), int(total))
        found.append(Evaluated(int(record["step"]), accuracy, counts))
    return found


@dataclass(frozen=True)
class Difference:
    """Accuracy minus the reference's, and Newcombe's interval; None where a count is missing."""

    value: float
    interval: Interval | None


def difference(run: Evaluated, reference: Evaluated) -> Difference:
    """`run` minus `reference`, as if their prompts were independent samples."""
    interval = newcombe(*run.counts, *reference.counts) if run.counts and reference.counts else None
    return Difference(run.accuracy - reference.accuracy, interval)


@dataclass(frozen=True)
class ComparedRun:
    """A row of the comparison. What the files do not hold is None, or NaN for a mean."""

    run: Run
    method: str
    parts: Components
    steps: int
    before: Evaluated | None
    final: Evaluated | None
    to_first: Difference | None
    same_prompts: bool
    entropy: tuple[float, float] | None
    pass_rate: float
    length: float
    tokens_per_second: float
    seconds: float


def compare(runs: Sequence[Run]) -> list[ComparedRun]:
    """One row a run, in the order given; the first is the reference of the differences."""
    finals = [_final(run) for run in runs]
    reference = finals[0]
    rows = []
    for i, (run, final) in enumerate(zip(runs, finals, strict=True)):
        accuracies = evaluated(run)
        entropies = run.series("entropy/student")[1]
        times = [{key: number(r, key) for key in r} for r in run.metrics]
        training = sum(map(training_seconds, times))
        tokens = sum(run.series("tokens/response")[1])
        rows.append(
            ComparedRun(
                run=run,
                method=method_name(run.config),
                parts=components(run.config),
                steps=int(run.metrics[-1]["step"]) if run.metrics else 0,
                before=accuracies[0] if accuracies and accuracies[0].step == 0 else None,
                final=final,
                to_first=difference(final, reference) if i and final and reference else None,
                same_prompts=_same_prompts(run, final, runs[0], reference),
                entropy=(entropies[0], entropies[-1]) if entropies else None,
                pass_rate=_late_mean(run, "rollout/pass_rate"),
                length=_late_mean(run, "rollout/length_mean"),
                tokens_per_second=tokens / training if training and tokens else math.nan,
                seconds=sum(map(phase_seconds, times)),
            )
        )
    return rows


def _same_prompts(run: Run, final: Evaluated | None, other: Run, reference: Evaluated | None) -> bool:
    """Whether file and number of the held-out prompts are equal, as far as is known."""
    totals = {evaluation.counts[1] for evaluation in (final, reference) if evaluation and evaluation.counts}
    return run.config.evaluation.prompts == other.config.evaluation.prompts and len(totals) < 2


def _final(run: Run) -> Evaluated | None:
    """The last evaluation after a step."""
    trained = [evaluation for evaluation in evaluated(run) if evaluation.step > 0]
    return trained[-1] if trained else None


def _late_mean(run: Run, key: str) -> float:
    """The mean over the last quarter of the steps that have the key, at least one step."""
    values = run.series(key)[1]
    last = values[-max(1, len(values) // 4) :] if values else []
    return sum(last) / len(last) if last else math.nan
