"""Which tokens an objective keeps, and how much of them: normalised signals, selection by rank, look-ahead.

Everything is over the tokens of the global batch, or of one rollout of it, and ties are broken by the token's index:
the result depends on no layout.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import TokenTable


def kept_count(share: float, tokens: int) -> int:
    """``ceil(share * tokens)``, exact for shares such as 0.29 of 100."""
    return min(tokens, math.ceil(round(share * tokens, 9)))


def top_share(signal: Tensor, share: float) -> Tensor:
    """bool [N]: the ``ceil(share * N)`` largest values. Of equal ones the later token is the larger."""
    kept = signal.new_zeros(len(signal)).bool()
    kept[signal.argsort(stable=True)[len(signal) - kept_count(share, len(signal)) :]] = True
    return kept


def top_share_of_rollouts(table: TokenTable, signal: Tensor, share: float) -> Tensor:
    """As ``top_share`` among the tokens of each rollout."""
    kept = signal.new_zeros(len(signal)).bool()
    for rollout in range(table.num_rollouts):
        tokens = table.rollout_slice(rollout)
        kept[tokens] = top_share(signal[tokens], share)
    return kept


def rescaled(signal: Tensor, low_quantile: float = 0.0, high_quantile: float = 1.0) -> Tensor:
    """The signal on [0, 1], float64: two quantiles (by default minimum and maximum) go to 0 and 1, beyond is clamped.

    A constant signal becomes 0.
    """
    if not len(signal):
        return signal.double()
    ordered = signal.double().sort().values
    last = len(ordered) - 1
    low = ordered[round(low_quantile * last)]
    high = ordered[round(high_quantile * last)]
    span = high - low
    if not float(span) > 0:
        return ordered.new_zeros(len(ordered))
    return ((signal.double() - low) / span).clamp(0.0, 1.0)


def lookahead_min(table: TokenTable, signal: Tensor, window: int) -> Tensor:
    """``min(x_t, ..., x_{t + window})`` within the response of t; the window ends with it."""
    smallest = signal.clone()
    position, length = table.position(), table.of_tokens(table.lengths)
    for offset in range(1, window + 1):
        inside = position + offset < length
        ahead = signal.roll(-offset)
        smallest = smallest.where(~inside, smallest.minimum(ahead))
    return smallest


def reduced_to_rollouts(
    table: TokenTable, weights: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, float]:
    """(weights, normaliser) of the mean over rollouts of each one's mean over its (kept) tokens.

    A rollout without such a token counts for nothing, in neither sum.
    """
    counted = table.every_token() if kept is None else kept
    counts = table.rollout_sum(counted.float())
    shares = weights / table.of_tokens(counts.clamp_min(1)).to(weights.dtype)
    return shares * counted, float((counts > 0).sum())
