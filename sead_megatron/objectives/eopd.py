"""EOPD (arXiv 2603.07079): sampled OPD everywhere, and forward KL on top where the teacher is unsure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term, TopK
from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.section import NonNegativeFloat

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class EopdObjective(PolicyGradientSection):
    """EOPD (arXiv 2603.07079): ``L_OPD + alpha 1[H_teacher > threshold] FKL_topk``, an addition and not a switch.

    There is one update per batch of rollouts here; the paper makes four, with a clipped ratio.
    """

    name: Literal["eopd"] = "eopd"
    """`eopd`."""
    threshold: NonNegativeFloat = 0.8
    """Teacher entropy over the whole vocabulary, nats, above which the forward KL is added (about 18.5 % of tokens in
    the paper). Watch `gate/mean`."""
    alpha: NonNegativeFloat = 1.0
    """Weight of the forward KL."""
    topk: Annotated[int, Field(gt=0, le=128)] = 16
    """k: the teacher's k most likely tokens, renormalised, against the student's full distribution."""


class Eopd(Objective[EopdObjective]):
    """Both parts are divided by the number of all response tokens."""

    @property
    def needs_teacher_entropy(self) -> bool:
        return True

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        gate = table.require("teacher_entropy") > self.config.threshold
        metrics = {"gate/mean": float(gate.double().mean())} if table.num_tokens else {}
        return policy_gradient(
            table,
            log_ratio(table),
            float(table.num_tokens),
            self.config.importance_clip,
            others={Term.FORWARD_KL: self.config.alpha * gate.float()},
            divergence=TopK("forward_teacher_norm", self.config.topk),
            metrics=metrics,
        )
