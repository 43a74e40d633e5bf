"""GRPO (arXiv 2402.03300) with DAPO's changes (arXiv 2503.14476), optionally beside sampled OPD."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from sead_megatron.objectives.advantages import equal_groups, group_advantages, log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.objectives.selection import reduced_to_rollouts
from sead_megatron.section import NonNegativeFloat, NonNegativeInt

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, RolloutFacts, TokenTable


class GrpoObjective(PolicyGradientSection):
    """GRPO: advantages of whole rollouts within the group of a prompt, from the reward of the final answer.

    Defaults are DAPO's where both differ, except that there is one update per batch, so that no ratio is clipped.
    """

    name: Literal["grpo"] = "grpo"
    """`grpo`."""
    reduce: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: every token counts the same (DAPO). `sequence_mean`: every rollout does (GRPO)."""
    divide_by_std: bool = True
    """Divide centred rewards by the group's standard deviation. False: Dr. GRPO (arXiv 2503.20783)."""
    drop_equal_groups: bool = True
    """Leave groups whose rewards are all equal out of the denominator too (DAPO's dynamic sampling, without drawing
    others in their place)."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens at the end of the longest response over which a penalty grows linearly from 0 to 1 (DAPO: 4096 of 20480);
    0 for none."""
    reference_kl: NonNegativeFloat = 0.0
    """Coefficient of KL(student || reference), estimated by r - log r - 1, r = ref(y) / q(y) (GRPO 0.04, DAPO 0)."""
    distillation: NonNegativeFloat = 0.0
    """Adds so much of sampled OPD's advantage log p(y) - log q(y), of the teacher; 0 for none."""

    needs_rewards: ClassVar[bool] = True
    min_samples_per_prompt: ClassVar[int] = 2

    @property
    def needs_teacher(self) -> bool:
        return self.distillation > 0

    @property
    def needs_reference(self) -> bool:
        return self.reference_kl > 0


class Grpo(Objective[GrpoObjective]):
    """``A_i = (r_i - mean) / std`` of the group, the same for each token of a rollout."""

    @property
    def needs_teacher_logprob(self) -> bool:
        return self.config.distillation > 0

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        config, facts = self.config, table.facts()
        reward = facts.reward.double() - self._overlong(table, facts)
        dropped = equal_groups(reward, facts.group)
        advantage = table.of_tokens(
            group_advantages(reward, facts.group, divide_by_std=config.divide_by_std).float()
        )
        if config.distillation:
            advantage = advantage + config.distillation * log_ratio(table)
        if config.reference_kl:
            # The estimator's gradient is (1 - r) grad log q, r = ref / q.
            ratio = (table.require("reference_logprob") - table.policy_logprob).exp()
            advantage = advantage - config.reference_kl * (1 - ratio)
        kept = table.every_token()
        # With another term in the advantage such a group has something to teach.
        if config.drop_equal_groups and not config.distillation and not config.reference_kl:
            kept = table.of_tokens(~dropped)
        normalizer = float(kept.sum())
        advantage = advantage * kept
        if config.reduce == "sequence_mean":
            advantage, normalizer = reduced_to_rollouts(table, advantage, kept)
        metrics = {"reward/mean": float(reward.mean()), "reward/equal_groups": float(dropped.double().mean())}
        return policy_gradient(table, advantage, normalizer, config.importance_clip, metrics=metrics)

    def _overlong(self, table: TokenTable, facts: RolloutFacts) -> Tensor:
        """DAPO's soft overlong punishment, 0 to 1, float64 [S]."""
        buffer = self.config.overlong_buffer
        if not buffer:
            return facts.reward.double() * 0
        return ((table.lengths - (facts.longest - buffer)).double() / buffer).clamp(0, 1)
