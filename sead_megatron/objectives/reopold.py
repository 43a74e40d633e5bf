"""REOPOLD (arXiv 2603.11137): sampled OPD with a floor under its reward, in two phases of token selection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.objectives.selection import top_share
from sead_megatron.section import Share

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class ReopoldObjective(PolicyGradientSection):
    """REOPOLD (arXiv 2603.11137, Eq. 4, 7, 9, 10): ``1/sum M * sum M_t max(l_t, floor) grad log q(y_t)``."""

    name: Literal["reopold"] = "reopold"
    """`reopold`."""
    mixing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Lambda of the floor log(lambda) / (1 - lambda), -2.558 nats for 0.1 (the paper)."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Beta: in the second phase the tokens with this share of the highest student entropies are trained on (0.2)."""
    switch_at: Share = 0.5
    """Share of the run's steps after which the second phase begins (the paper: 150 of 300)."""


class Reopold(Objective[ReopoldObjective]):
    """First phase: tokens whose reward is at least the floor. Second: the highest student entropies of the batch.

    So the floor itself only matters in the second phase, where a kept token's reward can be below it.
    """

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    @property
    def floor(self) -> float:
        """The smallest reward, nats."""
        return math.log(self.config.mixing) / (1 - self.config.mixing)

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        reward = log_ratio(table)
        if step < self.config.switch_at * self.total_steps:
            kept = reward >= self.floor
        else:
            kept = top_share(table.require("student_entropy"), self.config.share)
        advantage = reward.clamp(min=self.floor) * kept
        return policy_gradient(table, advantage, float(kept.sum()), self.config.importance_clip)
