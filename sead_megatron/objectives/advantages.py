"""Advantages of policy-gradient objectives: log-ratios of sampled tokens, rewards, importance weights.

The loss of a token is ``-A log q(y)`` with a detached advantage A. There is one update per batch of rollouts, so the
ratio of PPO's clipped surrogate is 1 and clipping it does nothing: no objective here has such a clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sead_megatron.data.terms import Divergence, Term
from sead_megatron.objectives.base import coefficients_of

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable

# Added to a standard deviation that is divided by, as in the public implementations of GRPO.
_EPSILON = 1e-6


def log_ratio(table: TokenTable) -> Tensor:
    """``l = log p(y) - log q(y)`` of the sampled tokens, teacher over student, nats [N]: the advantage of plain OPD."""
    return table.require("teacher_logprob") - table.policy_logprob


def importance_weights(table: TokenTable, clip: float | None) -> Tensor | None:
    """``min(q(y) / mu(y), clip)`` [N]; mu is the sampling distribution before top-p and top-k. None without a clip."""
    if clip is None:
        return None
    return (table.policy_logprob - table.require("sampling_logprob")).exp().clamp(max=clip)


def policy_gradient(
    table: TokenTable,
    advantage: Tensor,
    normalizer: float,
    importance_clip: float | None = None,
    *,
    others: Mapping[Term, Tensor | float] | None = None,
    divergence: Divergence | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Coefficients:
    """Coefficients of ``-1/normalizer * sum_t A_t log q(y_t)`` and of `others` (of that `divergence`) beside it.

    Args:
        advantage: [N], already 0 where a token is left out.
        importance_clip: see ``PolicyGradientSection``.
    """
    logged = dict(metrics or {})
    if table.num_tokens:
        logged["advantage/mean"] = float(advantage.double().mean())
    weights = importance_weights(table, importance_clip)
    if weights is not None:
        advantage = advantage * weights
        if table.num_tokens:
            logged["importance/mean"] = float(weights.double().mean())
            logged["importance/clipped"] = float(weights.ge(importance_clip or 0.0).double().mean())
    terms = {Term.LOGPROB: -advantage} | dict(others or {})
    return coefficients_of(table, terms, normalizer, divergence=divergence, metrics=logged)


def group_advantages(reward: Tensor, group: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """``(r - mean) / std`` of each rollout among those of its prompt (GRPO, arXiv 2402.03300); float64 [S].

    The standard deviation is the sample's (n - 1). A group of one, or one of equal rewards, has the advantage 0.
    """
    reward = reward.double()
    groups = int(group.max()) + 1 if len(group) else 0
    count = reward.new_zeros(groups).index_add_(0, group, reward.new_ones(len(reward)))
    mean = reward.new_zeros(groups).index_add_(0, group, reward) / count.clamp_min(1)
    centred = reward - mean[group]
    if not divide_by_std:
        return centred
    variance = reward.new_zeros(groups).index_add_(0, group, centred**2) / (count - 1).clamp_min(1)
    return centred / (variance.sqrt()[group] + _EPSILON)


def equal_groups(reward: Tensor, group: Tensor) -> Tensor:
    """Whether all rollouts of a rollout's prompt have the same reward; bool [S]."""
    return group_advantages(reward, group, divide_by_std=False) == 0


class RunningMoments:
    """Mean and standard deviation of everything seen so far, for rewards without a group (Welford, 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def whiten(self, values: Tensor) -> Tensor:
        """``(v - mean) / std`` float64 with moments that include these values; 0 as long as all were equal."""
        for value in values.double().tolist():
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.squares += delta * (value - self.mean)
        std = (self.squares / max(1, self.count - 1)) ** 0.5
        return (values.double() - self.mean) / (std + _EPSILON)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for another state."""
        if set(state) != {"count", "mean", "squares"}:
            raise ValueError(f"not running moments: {sorted(state)}")
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
