"""SEAD (arXiv 2606.28562): zones by entropy, reverse KL on B, annealed forward KL on C, nothing on A."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sead_megatron.data.types import Coefficients, Term, TokenTable, Zone
from sead_megatron.errors import UserError
from sead_megatron.objectives.base import token_metrics
from sead_megatron.objectives.schedule import cosine_annealing
from sead_megatron.objectives.zones import (
    ZoneThresholds,
    assign_by_rank,
    assign_by_threshold,
    implied_thresholds,
)

if TYPE_CHECKING:
    from sead_megatron.config.objective import SeadObjective


class Sead:
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
        self._config = config
        self._total_steps = total_steps
        self._thresholds: ZoneThresholds | None = None
        self._measured_lambda: float | None = None

    @property
    def needs_teacher_entropy(self) -> bool:
        return self._config.token_zones

    @property
    def uses_trainer_entropy(self) -> bool:
        return self._config.token_zones and self._config.student_entropy == "trainer"

    @property
    def teacher_topk(self) -> int:
        return self._config.teacher_topk if self._config.teacher_entropy == "topk" else 0

    def needs_token_stats(self, step: int) -> bool:
        unmeasured = self._config.lambda_fkl == "auto" and self._measured_lambda is None
        return self.uses_trainer_entropy or unmeasured

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        alpha = self._alpha(step)
        every = torch.ones(table.num_tokens, dtype=torch.bool, device=table.device)
        metrics = {"alpha": alpha}
        if self._config.token_zones:
            zones, thresholds = self._zones(table, step)
            reverse, forward, active = zones == Zone.B, zones == Zone.C, zones != Zone.A
            mixed = self._config.zone_c == "mix"
            metrics |= _zone_metrics(zones, table) | thresholds.metrics()
        else:
            zones, reverse, forward, active, mixed = None, every, every, every, True
        scale = self._lambda(table, reverse, forward)
        weights = torch.zeros(table.num_tokens, len(Term), dtype=torch.float32, device=table.device)
        weights[reverse, Term.REVERSE_KL] = 1.0
        weights[forward, Term.FORWARD_KL] = alpha * scale
        if mixed:
            weights[forward, Term.REVERSE_KL] = 1.0 - alpha
        num_active = int(active.sum())
        metrics |= {"lambda_fkl": scale} | token_metrics(table, num_active)
        return Coefficients(
            weights=weights, normalizer=float(max(1, num_active)), zones=zones, metrics=metrics
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
        config = self._config
        if config.annealing:
            return cosine_annealing(step, self._total_steps, config.alpha_start, config.alpha_end)
        return 1.0 if config.token_zones else 0.0

    def _zones(self, table: TokenTable, step: int) -> tuple[Tensor, ZoneThresholds]:
        config = self._config
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
        counts, shares = _counts(zones), self._config.zones
        filled = all(
            count or not share for count, share in zip(counts, (shares.a, shares.b, shares.c), strict=True)
        )
        return filled and not any(math.isnan(value) for value in asdict(thresholds).values())

    def _lambda(self, table: TokenTable, reverse: Tensor, forward: Tensor) -> float:
        if self._config.lambda_fkl != "auto":
            return self._config.lambda_fkl
        if self._measured_lambda is None:
            mean_reverse = float(table.require("reverse_kl")[reverse].double().mean())
            mean_forward = float(table.require("forward_kl")[forward].double().mean())
            # The mean over an empty zone is NaN: the next batch may have both zones.
            if all(math.isfinite(mean) and mean > 0 for mean in (mean_reverse, mean_forward)):
                self._measured_lambda = mean_reverse / mean_forward
        return 1.0 if self._measured_lambda is None else self._measured_lambda


def _counts(zones: Tensor) -> list[int]:
    counts: list[int] = torch.bincount(zones.long(), minlength=len(Zone)).tolist()
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
