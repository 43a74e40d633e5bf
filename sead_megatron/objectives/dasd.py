"""Direction-adaptive self-distillation (arXiv 2605.22263): GRPO, attracted to or repelled from a privileged teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sead_megatron.objectives.advantages import group_advantages, log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.section import NonNegativeFloat

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable

_EPSILON = 1e-6


class DasdObjective(PolicyGradientSection):
    """DASD (arXiv 2605.22263): ``A_t = A_group + beta omega_t d_t``.

    Not published: beta, and how the log-gap d is normalised; here it is a z-score within the rollout.
    """

    name: Literal["dasd"] = "dasd"
    """`dasd`."""
    beta: NonNegativeFloat = 0.1
    """Weight of the distillation term."""
    forks: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Rho: the share of a rollout's tokens whose entropy makes them forks, where the teacher repels."""

    needs_rewards: ClassVar[bool] = True
    min_samples_per_prompt: ClassVar[int] = 2

    @property
    def needs_solutions(self) -> bool:
        return True


class Dasd(Objective[DasdObjective]):
    """``omega = tanh((tau - H_s) / sigma) sigmoid(|d| - 1)`` within each rollout.

    tau is the (1 - rho) quantile of its student entropies, sigma their mean absolute deviation: positive below tau.
    """

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        facts = table.facts()
        advantage = table.of_tokens(group_advantages(facts.reward, facts.group).float())
        advantage = advantage + self.config.beta * self.direction(table).float()
        return policy_gradient(
            table,
            advantage,
            float(table.num_tokens),
            self.config.importance_clip,
            metrics={"reward/mean": float(facts.reward.double().mean())},
        )

    def direction(self, table: TokenTable) -> Tensor:
        """``omega d``, float64 [N]."""
        gap, entropy = log_ratio(table).double(), table.require("student_entropy").double()
        result = gap.clone()
        for rollout in range(table.num_rollouts):
            tokens = table.rollout_slice(rollout)
            if tokens.start == tokens.stop:
                continue
            own, inside = entropy[tokens], gap[tokens]
            deviation = (own - own.mean()).abs().mean() + _EPSILON
            score = (inside - inside.mean()) / (inside.std(correction=0) + _EPSILON)
            attract = ((own.quantile(1 - self.config.forks) - own) / deviation).tanh()
            result[tokens] = attract * (score.abs() - 1).sigmoid() * score
        return result
