"""The numbers of the report: intervals, overlap, shares of zones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sead_megatron.evaluation.estimators import Interval, wilson
from sead_megatron.objectives.opd import OpdObjective
from sead_megatron.objectives.sead import SeadObjective
from sead_megatron.report.loading import Run, SampledRollout

Floats = npt.NDArray[np.float64]


def newcombe(correct: int, total: int, reference_correct: int, reference_total: int) -> Interval:
    """95 % interval of the difference of two independent shares, first minus reference.

    Newcombe's hybrid score (Statistics in Medicine 17, 1998, method 10), from both Wilson intervals.
    """
    first, second = correct / total, reference_correct / reference_total
    low, high = wilson(correct, total)
    other_low, other_high = wilson(reference_correct, reference_total)
    below = math.hypot(first - low, other_high - second)
    above = math.hypot(high - first, second - other_low)
    return first - second - below, first - second + above


@dataclass(frozen=True)
class Tokens:
    """Response tokens of the sampled rollouts of some steps, in order (N of them).

    Attributes:
        texts: N decoded tokens.
        zones: [N] letters, "" where the objective has no zones.
        student_entropy, teacher_entropy, forward_kl, reverse_kl: [N] in nats, NaN where not measured.
        loss: [N] each token's part of the objective's sum, NaN where it is not known.
    """

    texts: list[str]
    zones: npt.NDArray[np.str_]
    student_entropy: Floats
    teacher_entropy: Floats
    forward_kl: Floats
    reverse_kl: Floats
    loss: Floats

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def zoned(self) -> bool:
        return bool((self.zones != "").any())

    def in_zone(self, zone: str) -> npt.NDArray[np.bool_]:
        """bool [N]"""
        return self.zones == zone


def tokens_of(run: Run, steps: Sequence[int]) -> Tokens:
    """The tokens of these steps' sampled rollouts."""
    rollouts = [(step, rollout) for step in steps for rollout in run.rollouts.get(step, [])]
    sequences = [rollout for _, rollout in rollouts]
    forward, reverse = _column(sequences, "forward_kl"), _column(sequences, "reverse_kl")
    letters = [letter for rollout in sequences for letter in rollout.zones or [""] * len(rollout.tokens)]
    zones = np.array(letters, dtype="U1")
    token_steps = np.repeat([step for step, _ in rollouts], [len(rollout.tokens) for rollout in sequences])
    return Tokens(
        texts=[text for rollout in sequences for text in rollout.token_texts],
        zones=zones,
        student_entropy=_column(sequences, "student_entropy"),
        teacher_entropy=_column(sequences, "teacher_entropy"),
        forward_kl=forward,
        reverse_kl=reverse,
        loss=_losses(run, token_steps, zones, forward, reverse),
    )


def _column(rollouts: Sequence[SampledRollout], name: str) -> Floats:
    unknown = math.nan
    values = [
        unknown if value is None else value
        for rollout in rollouts
        for value in getattr(rollout, name) or [None] * len(rollout.tokens)
    ]
    return np.array(values, dtype=np.float64)


def _losses(
    run: Run, steps: npt.NDArray[np.int_], zones: npt.NDArray[np.str_], forward: Floats, reverse: Floats
) -> Floats:
    """[N] as `sead` and full `opd` weight tokens, with the recorded alpha and lambda; NaN for other objectives."""
    objective = run.config.objective
    if isinstance(objective, OpdObjective) and objective.form == "full":
        return reverse
    if not isinstance(objective, SeadObjective):
        return np.full_like(reverse, math.nan)
    recorded = {step: (run.at(step, "alpha"), run.at(step, "lambda_fkl")) for step in set(steps.tolist())}
    alpha, scale = (
        np.array([recorded[step][i] for step in steps.tolist()], dtype=np.float64) for i in range(2)
    )
    mixed = alpha * scale * forward + (1 - alpha) * reverse
    if not objective.token_zones:
        return mixed
    on_c = mixed if objective.zone_c == "mix" else alpha * scale * forward
    return np.select(
        [zones == "A", zones == "B", zones == "C"], [np.zeros_like(forward), reverse, on_c], math.nan
    )


def jaccard_of_top(first: Floats, second: Floats, share: float = 0.2) -> float:
    """|P n Q| / |P u Q| of the positions with the highest `share` of either value (the paper, section 4.1: 20 %).

    [N] each; positions where either is NaN do not count. round(share * N) positions are taken, at least one; equal
    values rank in token order, the earlier one lower, as zones do. NaN without any position.
    """
    known = np.isfinite(first) & np.isfinite(second)
    count = int(known.sum())
    if not count:
        return math.nan
    taken = max(1, round(share * count))
    tops = [set(np.argsort(values[known], kind="stable")[-taken:].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def share_of_top_half(values: Floats) -> float:
    """The part of the sum that the larger half of the values holds (the paper, Figure 2a). NaN when the sum is 0.

    Negative values, which rounding leaves of a KL of 0, count as 0.
    """
    ordered = np.sort(np.clip(values[np.isfinite(values)], 0, None))[::-1]
    total = float(ordered.sum())
    return float(ordered[: round(len(ordered) / 2)].sum()) / total if total else math.nan


@dataclass(frozen=True)
class ZoneShare:
    """A zone's parts of all tokens, of the summed forward KL and of the loss; NaN where it is not known."""

    zone: str
    count: int
    tokens: float
    forward_kl: float
    loss: float

    @property
    def concentration(self) -> float:
        """Share of the forward KL over share of the tokens (the paper, Figure 2d)."""
        return self.forward_kl / self.tokens if self.tokens else math.nan


def zone_shares(tokens: Tokens) -> list[ZoneShare]:
    """One entry a zone. Shares of a KL are over the tokens where it was measured, of which there may be none."""
    counted = int((tokens.zones != "").sum())
    rows = []
    for zone in "ABC":
        inside = tokens.in_zone(zone)
        count = int(inside.sum())
        parts = [_part(values, inside) for values in (tokens.forward_kl, tokens.loss)]
        rows.append(ZoneShare(zone, count, count / counted if counted else math.nan, *parts))
    return rows


def _part(values: Floats, inside: npt.NDArray[np.bool_]) -> float:
    amounts = np.clip(np.nan_to_num(values, nan=0.0), 0, None)
    total = float(amounts.sum())
    return float(amounts[inside].sum()) / total if total else math.nan
