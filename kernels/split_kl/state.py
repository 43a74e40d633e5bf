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

from typing import NamedTuple

import torch
from torch import Tensor

STATE_ROWS = 10

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


def empty_state(tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The neutral element of :func:`merge`, [10, tokens]."""
    state = torch.zeros(STATE_ROWS, tokens, dtype=dtype, device=device)
    state[0] = SENTINEL
    state[4] = SENTINEL
    return state


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
    """State of the union of two disjoint parts of the vocabulary; [10, T] or [10, ...] of any shape."""
    student_max, teacher_max = torch.maximum(left[0], right[0]), torch.maximum(left[4], right[4])
    merged = rescale(left, student_max, teacher_max).add_(rescale(right, student_max, teacher_max))
    merged[0] = student_max
    merged[4] = teacher_max
    return merged


def finalize(state: Tensor) -> TokenStats:
    """Statistics of a state that covers the whole vocabulary.

    H = ln s - u/s;  KL(p||q) = x_s/s_s - ln s_s + ln s_t;  KL(q||p) = -x_t/s_t + ln s_s - ln s_t.
    """
    m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z_y, w_y = state.unbind(0)
    log_s, log_t = s_s.log(), s_t.log()
    return TokenStats(
        student_lse=m_s + log_s,
        teacher_lse=m_t + log_t,
        student_entropy=log_s - u_s / s_s,
        teacher_entropy=log_t - u_t / s_t,
        forward_kl=(log_s - log_t) - x_t / s_t,
        reverse_kl=x_s / s_s - (log_s - log_t),
        # Centred first: the log-sum-exp has the rounding of a number of the size of m.
        student_logprob=(z_y - m_s) - log_s,
        teacher_logprob=(w_y - m_t) - log_t,
    )
