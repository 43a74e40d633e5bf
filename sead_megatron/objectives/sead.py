"""SEAD (arXiv 2606.28562): zones by entropy, reverse KL on B, annealed forward KL on C, nothing on A."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sead_megatron.data.terms import Term, Zone
from sead_megatron.errors import UserError
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.objectives.schedule import cosine_annealing
from sead_megatron.objectives.zones import (
    ZoneThresholds,
    assign_by_rank,
    assign_by_threshold,
    implied_thresholds,
)
from sead_megatron.section import Percent, PositiveFloat, PositiveInt, Section, Share

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Coefficients, TokenTable


class ZoneShares(Section):
    """Percentages of the response tokens of the global batch in each zone; they sum to 100 (SEAD, section
    2.3).

    Ambiguity: the abstract says about 50 % of the tokens are active, section 2.3 says 20 %. The zone shares
    of the paper's Table 3 recombine to 49.9/40.4/9.8, so 50/40/10 is what was run, enforced exactly over the
    pooled tokens.
    """

    a: Percent = 50.0
    """Zone A: student and teacher both confident. No gradient, not counted in the denominator."""
    b: Percent = 40.0
    """Zone B: the remainder, teacher confident and student not. Reverse KL."""
    c: Percent = 10.0
    """Zone C: the tokens with the largest teacher entropy. Forward KL, annealed.

    Ambiguity: once described as "both uncertain", once as "teacher entropy high"; Table 3 supports the
    latter."""


class SeadObjective(ObjectiveSection):
    """SEAD (arXiv 2606.28562), Eq. 4 and Algorithm 1: zones by entropy, reverse KL on B, annealed forward KL
    on C.

    Where the paper contradicts itself or is silent, the default is the reading that its formal statements and
    tables support, and the other readings are switches. Values of lambda and of the entropy's top-k are not
    published.
    """

    name: Literal["sead"] = "sead"
    """`sead`."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the loss.

    Ambiguity: rollouts are sampled at 0.7 (`rollout.temperature`), the loss names no temperature; hence 1."""
    zones: ZoneShares = ZoneShares()
    """Percentages of tokens in the zones A, B and C."""
    zone_mode: Literal["percentile", "absolute"] = "percentile"
    """`percentile`: fixed shares of every batch. `absolute`: entropy thresholds frozen after `absolute_after`
    steps.

    Ambiguity: the text speaks of a growing zone A and of falling thresholds, which fixed percentiles exclude;
    the experiments use percentiles. With `absolute` the shares can move as the student learns."""
    absolute_after: PositiveInt = 10
    """With `zone_mode: absolute`: steps of percentile zones after which the thresholds are frozen. Not
    published."""
    zone_a_score: Literal["max_rank", "student", "sum_rank"] = "max_rank"
    """What zone A (the smallest values of it) is ranked by, among the tokens that are not in C.

    Ambiguity: the order and the ranked quantity are not stated. `max_rank`: the larger of the ranks of
    student and teacher entropy, that is "both low"; `student`: the student's entropy alone; `sum_rank`: the
    sum of both ranks."""
    student_entropy: Literal["engine", "trainer"] = "engine"
    """Where the student's entropy comes from: `engine` (exact, while sampling) or `trainer` (one more forward
    pass).

    Ambiguity: which policy's entropy is meant; with one update per batch, behaviour and current policy are
    equal."""
    teacher_entropy: Literal["exact", "topk"] = "exact"
    """`exact`: over the full vocabulary. `topk`: over the teacher's `teacher_topk` tokens and one bucket for
    the tail.

    Ambiguity: the paper names a top-k (k not given), yet its divergences need the full softmax anyway."""
    teacher_topk: Annotated[int, Field(gt=0, le=128)] = 64
    """The k of `teacher_entropy: topk`, at most 128 (what the kernels keep). Not published."""
    token_zones: bool = True
    """False: the ablation without zones, in which entropies decide nothing and every token is active."""
    annealing: bool = True
    """False: alpha = 1 in every step, or 0 without zones, which is vanilla OPD (the first row of Table 2).

    Ambiguity: Eq. 5 (zones only) has no alpha; read as a constant 1."""
    alpha_start: Share = 0.8
    """Alpha of the first step of the cosine (Eq. 7).

    Ambiguity: section 3.3 speaks of "annealing from 0 to target"; Eq. 7 decays from 0.8 to 0."""
    alpha_end: Share = 0.0
    """Alpha at the end of the cosine (Eq. 7)."""
    zone_c: Literal["fkl_decay", "mix"] = "fkl_decay"
    """Loss on zone C. `fkl_decay`: alpha * lambda * FKL (Eq. 4, Algorithm 1, section 2.4). `mix`: alpha * FKL
    + (1 - alpha) * RKL (Figure 1).

    Ambiguity: the paper has both. Under `fkl_decay` zone C gets no gradient at the end of the run while it
    still counts in the denominator; under `mix` it ends as reverse KL."""
    lambda_fkl: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Balances the scale of forward KL on C against reverse KL on B. `auto`: mean RKL on B / mean FKL on C,
    measured once on the first batch. Ambiguity: required to be positive, value not published."""

    def check(self, config: TrainConfig) -> None:
        zones = self.zones
        total = zones.a + zones.b + zones.c
        if abs(total - 100) > 1e-9:
            raise UserError(
                "objective.zones",
                zones.model_dump(),
                f"must sum to 100 (they sum to {total:g})",
                f"use for example b: {100 - zones.a - zones.c:g}"
                if zones.a + zones.c <= 100
                else "use a: 50, b: 40, c: 10",
            )
        if self.zone_mode == "absolute" and self.absolute_after >= config.steps:
            raise UserError(
                "objective.absolute_after",
                self.absolute_after,
                f"must be less than steps ({config.steps}), or the thresholds are never frozen",
                "lower it, or use zone_mode: percentile",
            )


class Sead(Objective[SeadObjective]):
    """Eq. 4: ``L = 1/|B u C| * (sum_B RKL_t + alpha * lambda * sum_C FKL_t)`` over the global batch.

    ``zone_c: mix`` gives C the loss of Figure 1 instead, ``alpha * lambda * FKL + (1 - alpha) * RKL``. Alpha
    is Eq. 7, or 1 in every step without annealing (Eq. 5 has no alpha).

    Without token zones (``token_zones: false``, rows "KL Annealing only" and A + C of the paper's tables) the
    paper gives no formula. Our reading: every response token gets ``alpha * lambda * FKL + (1 - alpha) *
    RKL`` and counts in the denominator, that is Figure 1's mixture for all tokens; it is the only reading in
    which the ablation moves from forward to reverse KL. Then ``zone_c`` has no effect, and with annealing off
    as well alpha is 0, not 1: a run with neither component is the tables' first row, OPD with reverse KL.

    ``lambda_fkl: auto`` is mean RKL on B / mean FKL on C, measured in the first step in which both are
    positive and finite (both over all tokens without zones); until then the KLs of every token are asked for
    and lambda is 1.

    ``zone_mode: absolute`` assigns by rank in the first ``absolute_after`` steps and then by the thresholds
    the last rank assignment implied. Ranks stay in use for as long as no batch had a token in each zone that
    has a share.

    Raises UserError when absolute thresholds are asked of a rank sum.
    """

    def __init__(self, config: SeadObjective, total_steps: int) -> None:
        if config.zone_mode == "absolute" and config.zone_a_score == "sum_rank":
            raise UserError(
                "objective.zone_a_score",
                config.zone_a_score,
                "a sum of ranks has no threshold in nats to freeze with zone_mode: absolute",
                "use max_rank or student, or zone_mode: percentile",
            )
        super().__init__(config, total_steps)
        self._thresholds: ZoneThresholds | None = None
        self._measured_lambda: float | None = None

    @property
    def needs_teacher_entropy(self) -> bool:
        return self.config.token_zones

    @property
    def uses_trainer_entropy(self) -> bool:
        return self.config.token_zones and self.config.student_entropy == "trainer"

    @property
    def teacher_topk(self) -> int:
        return self.config.teacher_topk if self.config.teacher_entropy == "topk" else 0

    def needs_token_stats(self, step: int) -> bool:
        unmeasured = self.config.lambda_fkl == "auto" and self._measured_lambda is None
        return self.uses_trainer_entropy or unmeasured

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        alpha = self._alpha(step)
        metrics = {"alpha": alpha}
        if self.config.token_zones:
            zones, thresholds = self._zones(table, step)
            reverse, forward, active = zones == Zone.B, zones == Zone.C, zones != Zone.A
            mixed = self.config.zone_c == "mix"
            metrics |= _zone_metrics(zones, table) | thresholds.metrics()
        else:
            zones, mixed = None, True
            reverse = forward = active = table.every_token()
        scale = self._lambda(table, reverse, forward)
        reverse_weights = reverse.float()
        if mixed:
            reverse_weights[forward] = 1.0 - alpha
        # C keeps its place in the denominator when its weight is 0.
        num_active = int(active.sum())
        return coefficients_of(
            table,
            {Term.FORWARD_KL: forward.float() * (alpha * scale), Term.REVERSE_KL: reverse_weights},
            float(num_active),
            zones=zones,
            metrics=metrics | {"lambda_fkl": scale, "tokens/active": float(num_active)},
        )

    def state_dict(self) -> dict[str, Any]:
        thresholds = None if self._thresholds is None else asdict(self._thresholds)
        return {"lambda_fkl": self._measured_lambda, "thresholds": thresholds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"lambda_fkl", "thresholds"}:
            raise ValueError(f"not a state of sead: {sorted(state)}")
        self._measured_lambda = state["lambda_fkl"]
        self._thresholds = None if state["thresholds"] is None else ZoneThresholds(**state["thresholds"])

    def _alpha(self, step: int) -> float:
        config = self.config
        if config.annealing:
            return cosine_annealing(step, self.total_steps, config.alpha_start, config.alpha_end)
        return 1.0 if config.token_zones else 0.0

    def _zones(self, table: TokenTable, step: int) -> tuple[Tensor, ZoneThresholds]:
        config = self.config
        entropies = table.require("teacher_entropy"), table.require("student_entropy")
        if config.zone_mode == "absolute" and step >= config.absolute_after and self._thresholds is not None:
            return assign_by_threshold(*entropies, self._thresholds), self._thresholds
        zones = assign_by_rank(*entropies, config.zones.a, config.zones.c, config.zone_a_score)
        thresholds = implied_thresholds(zones, *entropies, config.zone_a_score)
        if config.zone_mode == "absolute" and self._can_freeze(zones, thresholds):
            self._thresholds = thresholds
        return zones, thresholds

    def _can_freeze(self, zones: Tensor, thresholds: ZoneThresholds) -> bool:
        """A zone that only a tiny batch left empty must not stay empty for the rest of the run."""
        counts, shares = _counts(zones), self.config.zones
        filled = all(
            count or not share for count, share in zip(counts, (shares.a, shares.b, shares.c), strict=True)
        )
        return filled and not any(math.isnan(value) for value in asdict(thresholds).values())

    def _lambda(self, table: TokenTable, reverse: Tensor, forward: Tensor) -> float:
        if self.config.lambda_fkl != "auto":
            return self.config.lambda_fkl
        if self._measured_lambda is None:
            mean_reverse = float(table.require("reverse_kl")[reverse].double().mean())
            mean_forward = float(table.require("forward_kl")[forward].double().mean())
            # The mean over an empty zone is NaN: the next batch may have both zones.
            if all(math.isfinite(mean) and mean > 0 for mean in (mean_reverse, mean_forward)):
                self._measured_lambda = mean_reverse / mean_forward
        return 1.0 if self._measured_lambda is None else self._measured_lambda


def _counts(zones: Tensor) -> list[int]:
    counts: list[int] = zones.long().bincount(minlength=len(Zone)).tolist()
    return counts


def _zone_metrics(zones: Tensor, table: TokenTable) -> dict[str, float]:
    """Shares of tokens, shares of the summed forward KL where it was measured, and the number of empty zones.

    Shares are 0 when there is nothing to share. Rounding can leave a KL of 0 slightly negative: clamped, for
    the shares.
    """
    counts = _counts(zones)
    metrics = {"zone/empty": float(counts.count(0))}
    for zone, count in zip(Zone, counts, strict=True):
        metrics[f"zone/{zone.name.lower()}_share"] = count / max(1, table.num_tokens)
    if table.forward_kl is not None:
        forward_kl = table.forward_kl.double().clamp_min(0)
        total = float(forward_kl.sum())
        for zone in Zone:
            mass = float(forward_kl[zones == zone].sum())
            metrics[f"zone/{zone.name.lower()}_fkl_share"] = mass / total if total else 0.0
    return metrics
