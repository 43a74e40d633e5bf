"""MOPD (arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780): sampled OPD towards the teacher of the prompt's domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sead_megatron.data.terms import Term
from sead_megatron.errors import UserError
from sead_megatron.objectives.advantages import group_advantages, log_ratio
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.objectives.selection import reduced_to_rollouts
from sead_megatron.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Coefficients, TokenTable


class MopdObjective(ObjectiveSection):
    """MOPD (arXiv 2606.30406): the advantage is log p_d(y) - log q(y) of the domain's teacher plus one of the outcome.

    `teacher.domains` names the teachers. Sampled tokens are weighed by q(y) / mu(y), where mu is what they were drawn
    from, or left out where that ratio says that engine and trainer disagree.
    """

    name: Literal["mopd"] = "mopd"
    """`mopd`."""
    outcome: NonNegativeFloat = 1.0
    """Alpha: adds so much of GRPO's advantage of the final answer within the group of a prompt; 0 for none, which needs
    neither answers nor groups. Not published."""
    divide_by_std: bool = True
    """Divide the outcome's centred rewards by the group's standard deviation (GRPO)."""
    ratio_low: NonNegativeFloat = 0.5
    """A token whose q(y) / mu(y) is below counts for nothing. Not published."""
    ratio_high: PositiveFloat = 2.0
    """A token whose q(y) / mu(y) is above counts for nothing. Not published."""
    trainer_ratio: bool = True
    """Measure q(y) by a forward pass of the trainer before the update. False: the engine's own, at
    `objective.temperature`; the ratio then corrects another sampling temperature only, and no pass is made."""
    reduce: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """`sequence_mean`: every rollout counts the same (the published 1/|y|). `token_mean`: every token does."""

    @property
    def follows_sampled_tokens(self) -> bool:
        return True

    @property
    def corrects_sampling(self) -> bool:
        return True

    @property
    def needs_rewards(self) -> bool:  # type: ignore[override]  # by the settings, where others always or never do
        return self.outcome > 0

    @property
    def min_samples_per_prompt(self) -> int:  # type: ignore[override]
        return 2 if self.outcome > 0 else 1

    def check(self, config: TrainConfig) -> None:
        if self.ratio_low >= self.ratio_high:
            raise UserError(
                "objective.ratio_low",
                self.ratio_low,
                f"must be less than objective.ratio_high ({self.ratio_high:g})",
                "use for example 0.5 and 2.0",
            )


class Mopd(Objective[MopdObjective]):
    """``-1/S sum_i 1/|y_i| sum_t w_t A_t log q(y_t)``, ``A_t = log p_d - log q + alpha A_outcome``, detached.

    ``w_t = q / mu`` where that lies in [ratio_low, ratio_high], 0 elsewhere. The S rollouts that have tokens count.
    """

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def needs_token_stats(self, step: int) -> bool:
        return self.config.trainer_ratio

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        config = self.config
        gap = log_ratio(table)
        advantage = gap
        metrics = {}
        if config.outcome:
            facts = table.facts()
            outcome = group_advantages(facts.reward, facts.group, divide_by_std=config.divide_by_std)
            advantage = advantage + config.outcome * table.of_tokens(outcome.float())
            metrics["reward/mean"] = float(facts.reward.double().mean())
        q = table.policy_logprob if config.trainer_ratio else table.require("rollout_logprob")
        ratio = (q - table.require("sampling_logprob")).exp()
        kept = (ratio >= config.ratio_low) & (ratio <= config.ratio_high)
        weighted = advantage * ratio * kept
        if table.num_tokens:
            metrics["advantage/mean"] = float(advantage.double().mean())
            metrics["importance/mean"] = float((ratio * kept).double().mean())
            metrics["importance/clipped"] = float((~kept).double().mean())
        normalizer = float(table.num_tokens)
        if config.reduce == "sequence_mean":
            weighted, normalizer = reduced_to_rollouts(table, weighted)
        metrics |= _of_domains(table, gap)
        return coefficients_of(table, {Term.LOGPROB: -weighted}, normalizer, metrics=metrics)


def _of_domains(table: TokenTable, gap: Tensor) -> dict[str, float]:
    """Each domain's mean of ``log q(y) - log p(y)``, an estimate of its reverse KL, nats, over its tokens."""
    if table.rollouts is None:
        return {}
    domains = table.rollouts.domains
    sums, lengths = table.rollout_sum(gap).tolist(), table.lengths.tolist()
    metrics = {}
    for domain in sorted({domain for domain in domains if domain is not None}):
        own = [i for i, of in enumerate(domains) if of == domain]
        if tokens := sum(lengths[i] for i in own):
            metrics[f"domain/{domain}/reverse_kl"] = -sum(sums[i] for i in own) / tokens
    return metrics
