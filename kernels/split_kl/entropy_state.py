"""The streaming state of one softmax: log-sum-exp, entropy, sampled logit, top-k and gathered logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .state import SENTINEL
from .topk import NO_ID, merge_largest

ENTROPY_ROWS = 4


@dataclass(frozen=True)
class EntropyState:
    """State of one model over a part of the vocabulary.

    Attributes:
        rows: [4, T], rows 0 to 2 and 8 of ``state``: m, s, u, z_y.
        topk_logits, topk_ids: [T, K] and int64 [T, K], the K largest logits in the order of ``topk``, or None.
            Slots that a part of fewer than K rows leaves empty hold (SENTINEL, NO_ID).
        gathered: [T, G] logits of the ids that were asked for, 0 where another part holds them, or None.
    """

    rows: Tensor
    topk_logits: Tensor | None = None
    topk_ids: Tensor | None = None
    gathered: Tensor | None = None


class EntropyStats(NamedTuple):
    """Statistics of one model, nats; fields [T], but ids and log-probabilities [T, K] or [T, G].

    ``topk_entropy`` H_k = -sum_S q ln q - Q' ln Q' counts the K most likely tokens S and one bucket for all
    others, of mass Q' = ``tail_mass``. It bounds the exact entropy from both sides:
    H_k <= H <= H_k + ``topk_slack``, the slack being Q' ln(V - K), reached by a uniform tail.
    ``support_tail_mass`` is 1 minus the mass of the gathered tokens. Empty slots of ``support_logprobs`` hold SENTINEL.
    Fields that were not asked for are None.
    """

    lse: Tensor
    entropy: Tensor
    logprob: Tensor
    topk_entropy: Tensor | None = None
    topk_slack: Tensor | None = None
    tail_mass: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    support_logprobs: Tensor | None = None
    support_tail_mass: Tensor | None = None


def empty_entropy_state(
    tokens: int, topk: int, gathered: int | None, *, dtype: torch.dtype, device: torch.device
) -> EntropyState:
    """The neutral element of :func:`merge_entropy`; ``gathered`` None: no ids were asked for."""
    rows = torch.zeros(ENTROPY_ROWS, tokens, dtype=dtype, device=device)
    rows[0] = SENTINEL
    picked = None if gathered is None else torch.zeros(tokens, gathered, dtype=dtype, device=device)
    if not topk:
        return EntropyState(rows, gathered=picked)
    logits = torch.full((tokens, topk), SENTINEL, dtype=dtype, device=device)
    return EntropyState(rows, logits, torch.full_like(logits, NO_ID, dtype=torch.int64), picked)


def merge_rows(left: Tensor, right: Tensor) -> Tensor:
    """As ``state.merge``, for the four rows [4, ...] of one model."""
    top = torch.maximum(left[0], right[0])
    parts = []
    for m, s, u, z_y in (left.unbind(0), right.unbind(0)):
        shift = m - top
        scale = shift.exp()
        parts.append(torch.stack([top, scale * s, scale * (u + shift * s), z_y]))
    rows = parts[0].add_(parts[1])
    rows[0] = top
    return rows


def merge_entropy(left: EntropyState, right: EntropyState) -> EntropyState:
    """State of the union of two disjoint parts, all ids of ``left`` below those of ``right``."""
    rows = merge_rows(left.rows, right.rows)
    gathered = None
    if left.gathered is not None and right.gathered is not None:
        gathered = left.gathered + right.gathered
    if (
        left.topk_logits is None
        or left.topk_ids is None
        or right.topk_logits is None
        or right.topk_ids is None
    ):
        return EntropyState(rows, gathered=gathered)
    topk = left.topk_logits.shape[1]
    logits, ids = merge_largest((left.topk_logits, left.topk_ids), (right.topk_logits, right.topk_ids), topk)
    return EntropyState(rows, logits, ids, gathered)


def finalize_entropy(state: EntropyState, vocabulary: int, gather_ids: Tensor | None = None) -> EntropyStats:
    """Statistics of one model from a state that covers the whole vocabulary of ``vocabulary`` true tokens.

    ``gather_ids``, those of pass 1, are wanted if some of them are ``topk.NO_ID``: such a slot has no mass, while
    its gathered 0 would be taken for a logit.
    """
    m, s, u, z_y = state.rows.unbind(0)
    log_sum = s.log()
    # Centred before the logarithm is subtracted: m + log s has the rounding of a number of the size of m.
    stats = EntropyStats(m + log_sum, log_sum - u / s, (z_y - m) - log_sum)
    if state.gathered is not None:
        centred = state.gathered - m[:, None]
        if gather_ids is not None:
            centred = centred.masked_fill(gather_ids == NO_ID, SENTINEL)
        tail_mass = _tail_mass(centred, s)
        stats = stats._replace(support_logprobs=centred - log_sum[:, None], support_tail_mass=tail_mass)
    if state.topk_logits is None:
        return stats
    centred = state.topk_logits - m[:, None]
    logprobs, tail_mass = centred - log_sum[:, None], _tail_mass(centred, s)
    return stats._replace(
        topk_entropy=torch.special.entr(tail_mass) - (logprobs.exp() * logprobs).sum(1),
        topk_slack=tail_mass * math.log(max(vocabulary - logprobs.shape[1], 1)),
        tail_mass=tail_mass,
        topk_ids=state.topk_ids,
        topk_logprobs=logprobs,
    )


def _tail_mass(centred: Tensor, total: Tensor) -> Tensor:
    """1 - sum_k e^centred / total [T]; the difference in float64 adds no rounding to that of ``total``.

    Exact to about 1e-7 in float32. Clamped at 0: a rounded total can be smaller than its parts.
    """
    rest = total.double() - centred.double().exp().sum(1)
    return (rest / total).clamp_(min=0).to(total.dtype)
