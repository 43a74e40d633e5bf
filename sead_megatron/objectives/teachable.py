"""Local teachability (arXiv 2605.13643): a rollout is learnt up to where the teacher stops telling tokens apart."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.section import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable


class TeachableObjective(ObjectiveSection):
    """Prefixes up to a change point (arXiv 2605.13643): reverse KL on the tokens before the teacher's margin drops.

    Neither the paper's margin nor its k could be read. Here the margin of a token is the largest
    ``log p_v - log q_v`` over the student's k likeliest tokens less the second largest, averaged over segments of a
    fixed length (the paper: sentences).
    """

    name: Literal["teachable"] = "teachable"
    """`teachable`."""
    topk: Annotated[int, Field(gt=1, le=128)] = 16
    """k."""
    segment_tokens: PositiveInt = 32
    """Tokens of a segment; the last one of a response can be longer, by less than a segment."""


class Teachable(Objective[TeachableObjective]):
    """Mean over the released tokens; a rollout without a change point is released as a whole."""

    @property
    def topk_lists(self) -> int:
        return self.config.topk

    def needs_token_stats(self, step: int) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        margin = table.require("topk_margin").double()
        released = margin.new_zeros(len(margin)).bool()
        for rollout in range(table.num_rollouts):
            tokens = table.rollout_slice(rollout)
            released[tokens][: self.released_tokens(margin[tokens])] = True
        return coefficients_of(table, {Term.REVERSE_KL: released.float()}, float(released.sum()))

    def released_tokens(self, margin: Tensor) -> int:
        """How many of a response's tokens are trained on; `margin`: float64 [R]."""
        size = self.config.segment_tokens
        count = len(margin) // size
        if count < 2:
            return len(margin)
        bounds = [i * size for i in range(count)] + [len(margin)]
        means = [float(margin[a:b].mean()) for a, b in pairwise(bounds)]
        change = downward_change(means)
        return len(margin) if change is None else bounds[change]


def downward_change(values: list[float]) -> int | None:
    """Where a sequence falls from one level to a lower one: the index of the first value after it, or None.

    One change point by the Bayesian information criterion: the best split is taken when
    ``n log(SSE_0 / SSE_c) > 2 log n`` and the mean behind it is the smaller one.
    """
    n = len(values)
    whole = _squared_error(values)
    if n < 2 or whole == 0:
        return None
    errors = [_squared_error(values[:c]) + _squared_error(values[c:]) for c in range(1, n)]
    best = min(range(1, n), key=lambda c: errors[c - 1])
    split = errors[best - 1]
    gain = math.inf if split == 0 else n * math.log(whole / split)
    falls = sum(values[best:]) / (n - best) < sum(values[:best]) / best
    return best if gain > 2 * math.log(n) and falls else None


def _squared_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
