"""SCOPE (arXiv 2604.10688): right rollouts are learnt, wrong ones are corrected by the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable


class ScopeObjective(PolicyGradientSection):
    """SCOPE (arXiv 2604.10688): weighted likelihood on right rollouts, weighted sampled OPD on wrong ones.

    The released scripts reverse the student's weights; these are the paper's.
    """

    name: Literal["scope"] = "scope"
    """`scope`."""
    tau: PositiveFloat = 1.0
    """Temperature of the weights within a prompt (the paper: 1)."""

    needs_rewards: ClassVar[bool] = True
    min_samples_per_prompt: ClassVar[int] = 2


class Scope(Objective[ScopeObjective]):
    """Within each prompt's right, and its wrong, rollouts the weights are a softmax times their number (mean 1).

    For right ones of ``-mean log q / tau``, what the student found hard; for wrong ones of ``mean log p / tau``, what
    the teacher knows.
    """

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        facts, tau = table.facts(), self.config.tau
        right = facts.reward > 0.5
        hard = -table.rollout_mean(table.policy_logprob) / tau
        known = table.rollout_mean(table.require("teacher_logprob")) / tau
        weights = softmax_weights(hard.where(right, known), facts.group * 2 + right)
        advantage = log_ratio(table)
        advantage = advantage.where(~table.of_tokens(right), advantage.new_ones(len(advantage)))
        metrics = {"reward/mean": float(facts.reward.double().mean())}
        return policy_gradient(
            table,
            advantage * table.of_tokens(weights.float()),
            float(table.num_tokens),
            self.config.importance_clip,
            metrics=metrics,
        )


def softmax_weights(scores: Tensor, group: Tensor) -> Tensor:
    """Softmax of the scores within each group, times the group's size; float64 [S]."""
    weights = scores.double().clone()
    for number in group.unique().tolist():
        members = group == number
        weights[members] = weights[members].softmax(0) * members.sum()
    return weights
