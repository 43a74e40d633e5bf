"""The streaming state of two softmaxes over one vocabulary: initialise, rescale, merge, finalise.

Per token, with student logits z, teacher logits w (both already divided by the temperature), centred by their
maxima m_s, m_t, and delta = (z - m_s) - (w - m_t), the ten rows of a state are

    0 m_s = max z    1 s_s = sum e^(z-m_s)    2 u_s = sum e^(z-m_s) (z-m_s)    3 x_s = sum e^(z-m_s) delta
    4 m_t = max w    5 s_t = sum e^(w-m_t)    6 u_t = sum e^(w-m_t) (w-m_t)    7 x_t = sum e^(w-m_t) delta
    8 z_y, 9 w_y     logits of the sampled token, 0 where the tile does not hold it

The centred form keeps a KL divergence exact to about 5e-7 in float32 whatever the logits' offset: E[z] - lse
would lose a factor of ten at an offset of 30. This is the online softmax (Milakov and Gimelshein, 2018,
algorithm 3) carried on to first moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

STATE_ROWS = 10
ENTROPY_ROWS = 4

_State = TypeVar("_State")

# Finite on purpose: the rescaling multiplies a shift by a sum, and (-inf) * 0 would be NaN.
SENTINEL = -1e30


class TokenStats(NamedTuple):
    """Statistics of each token, nats, every field [T]; at the temperature the state was computed with.

    ``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher). Rounding can leave a
    vanishing divergence at about -1e-6 in float32; it is not clamped, since gradients use the same numbers.
    """

    student_lse: Tensor
    teacher_lse: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor


@dataclass(frozen=True)
class EntropyState:
    """State of one model: ``rows`` [4, T] (m, s, u, z_y), the K largest logits [T, K] descending or None."""

    rows: Tensor
    topk_logits: Tensor | None = None


class EntropyStats(NamedTuple):
    """Statistics of one model, nats, every field [T].

    ``topk_entropy`` H_k = -sum_S q ln q - Q' ln Q' counts the K most likely tokens S and one bucket for all
    others, of mass Q' = ``tail_mass``. It bounds the exact entropy: H_k <= H <= H_k + Q' ln(V - K).
    Both are None for a state without top-k logits.
    """

    lse: Tensor
    entropy: Tensor
    logprob: Tensor
    topk_entropy: Tensor | None
    tail_mass: Tensor | None


def empty_state(tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The neutral element of :func:`merge`, [10, tokens]."""
    state = torch.zeros(STATE_ROWS, tokens, dtype=dtype, device=device)
    state[0] = SENTINEL
    state[4] = SENTINEL
    return state


def empty_entropy_state(tokens: int, topk: int, *, dtype: torch.dtype, device: torch.device) -> EntropyState:
    """The neutral element of :func:`merge_entropy`."""
    rows = torch.zeros(ENTROPY_ROWS, tokens, dtype=dtype, device=device)
    rows[0] = SENTINEL
    logits = torch.full((tokens, topk), SENTINEL, dtype=dtype, device=device) if topk else None
    return EntropyState(rows, logits)


def rescale(state: Tensor, student_max: Tensor, teacher_max: Tensor) -> Tensor:
    """The same sums, centred by other maxima (each [T], at least the state's own). Returns a new [10, T]."""
    m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z_y, w_y = state.unbind(0)
    d_s, d_t = m_s - student_max, m_t - teacher_max
    scale_s, scale_t = d_s.exp(), d_t.exp()
    return torch.stack([
        student_max,
        scale_s * s_s,
        scale_s * (u_s + d_s * s_s),
        scale_s * (x_s + (d_s - d_t) * s_s),
        teacher_max,
        scale_t * s_t,
        scale_t * (u_t + d_t * s_t),
        scale_t * (x_t + (d_s - d_t) * s_t),
        z_y,
        w_y,
    ])  # fmt: skip


def merge(left: Tensor, right: Tensor) -> Tensor:
    """State of the union of two disjoint parts of the vocabulary, [10, T]."""
    student_max, teacher_max = torch.maximum(left[0], right[0]), torch.maximum(left[4], right[4])
    merged = rescale(left, student_max, teacher_max).add_(rescale(right, student_max, teacher_max))
    merged[0] = student_max
    merged[4] = teacher_max
    return merged


def merge_entropy(left: EntropyState, right: EntropyState) -> EntropyState:
    """As :func:`merge`, for one model; keeps the K largest logits of both."""
    top = torch.maximum(left.rows[0], right.rows[0])
    parts = []
    for m, s, u, z_y in (left.rows.unbind(0), right.rows.unbind(0)):
        shift = m - top
        scale = shift.exp()
        parts.append(torch.stack([top, scale * s, scale * (u + shift * s), z_y]))
    rows = parts[0].add_(parts[1])
    rows[0] = top
    if left.topk_logits is None or right.topk_logits is None:
        return EntropyState(rows)
    both = torch.cat([left.topk_logits, right.topk_logits], dim=1)
    return EntropyState(rows, both.topk(left.topk_logits.shape[1], dim=1).values)


@overload
def merge_tp(state: Tensor, group: dist.ProcessGroup | None) -> Tensor: ...
@overload
def merge_tp(state: EntropyState, group: dist.ProcessGroup | None) -> EntropyState: ...
def merge_tp(state: Tensor | EntropyState, group: dist.ProcessGroup | None) -> Tensor | EntropyState:
    """State over the whole vocabulary from the states of a tensor-parallel group's shards.

    One all_gather, then every rank folds the parts in rank order: the result is bitwise identical on all
    ranks, so every rank draws the same zones from it. ``group`` None or of one rank returns ``state`` itself.
    """
    if group is None or group.size() == 1:
        return state
    if isinstance(state, Tensor):
        return _fold(list(_gather(state, group).unbind(0)), merge)
    topk_logits = state.topk_logits
    if topk_logits is None:
        return _fold([EntropyState(rows) for rows in _gather(state.rows, group).unbind(0)], merge_entropy)
    packed = _gather(torch.cat([state.rows, topk_logits.t()]), group)
    parts = [EntropyState(part[:ENTROPY_ROWS], part[ENTROPY_ROWS:].t()) for part in packed.unbind(0)]
    return _fold(parts, merge_entropy)


def _gather(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, T] of every rank as [ranks, rows, T]."""
    # gloo takes the concatenation along dimension 0 only, NCCL also the stack.
    gathered = packed.new_empty(group.size() * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed.contiguous(), group=group)
    return gathered.view(group.size(), *packed.shape)


def _fold(parts: Sequence[_State], combine: Callable[[_State, _State], _State]) -> _State:
    merged = parts[0]
    for part in parts[1:]:
        merged = combine(merged, part)
    return merged


def finalize(state: Tensor) -> TokenStats:
    """Statistics of a state that covers the whole vocabulary.

    H = ln s - u/s;  KL(p||q) = x_s/s_s - ln s_s + ln s_t;  KL(q||p) = -x_t/s_t + ln s_s - ln s_t.
    """
    m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z_y, w_y = state.unbind(0)
    log_s, log_t = s_s.log(), s_t.log()
    student_lse, teacher_lse = m_s + log_s, m_t + log_t
    return TokenStats(
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        student_entropy=log_s - u_s / s_s,
        teacher_entropy=log_t - u_t / s_t,
        forward_kl=(log_s - log_t) - x_t / s_t,
        reverse_kl=x_s / s_s - (log_s - log_t),
        student_logprob=z_y - student_lse,
        teacher_logprob=w_y - teacher_lse,
    )


def finalize_entropy(state: EntropyState) -> EntropyStats:
    """Statistics of one model from a state that covers the whole vocabulary."""
    m, s, u, z_y = state.rows.unbind(0)
    log_sum = s.log()
    lse = m + log_sum
    topk_entropy = tail_mass = None
    if state.topk_logits is not None:
        logprobs = state.topk_logits - lse[:, None]
        probs = logprobs.exp()
        # A sum that rounds above 1 would make the bucket's logarithm NaN.
        tail_mass = (1 - probs.sum(1)).clamp_(min=0)
        topk_entropy = torch.special.entr(tail_mass) - (probs * logprobs).sum(1)
    return EntropyStats(lse, log_sum - u / s, z_y - lse, topk_entropy, tail_mass)
