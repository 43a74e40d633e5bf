"""G-OPD and ExOPD (arXiv 2602.12125): sampled OPD towards a teacher extrapolated away from a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.section import PositiveFloat

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class GopdObjective(PolicyGradientSection):
    """G-OPD (arXiv 2602.12125): OPD against the geometric teacher ``p^strength ref^(1 - strength)``, unnormalised.

    1 is `opd` with `form: sampled`, below it interpolates, above it extrapolates (ExOPD).
    """

    name: Literal["gopd"] = "gopd"
    """`gopd`."""
    strength: PositiveFloat = 1.25
    """Lambda; the paper's ExOPD has 1.25. Much larger values are reported to break the format of responses."""

    @property
    def needs_reference(self) -> bool:
        return self.strength != 1


class Gopd(Objective[GopdObjective]):
    """``A_t = strength (log p - log ref)(y_t) - (log q - log ref)(y_t)`` over all response tokens."""

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        advantage = log_ratio(table)
        if self.config.needs_reference:
            gain = table.require("teacher_logprob") - table.require("reference_logprob")
            advantage = advantage + (self.config.strength - 1) * gain
        return policy_gradient(table, advantage, float(table.num_tokens), self.config.importance_clip)
