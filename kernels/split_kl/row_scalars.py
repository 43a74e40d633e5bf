"""What the logit gradient needs of each token: a few numbers, the same for every tile and backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .state import TokenStats

# Rows of the packed scalars.
SCALARS = ("student_lse", "teacher_lse", "offset", "difference", "entropy", "forward", "logprob")


def pack_scalars(stats: TokenStats, coefficients: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """[7, T], rows ``SCALARS``. With lp = ln p and lq = ln q of one vocabulary entry v the gradient is

        dL/dz_v = p (offset + difference (lp - lq) - entropy lq) - forward q + logprob 1{v = y}

    the sum of c_f (p - q), c_r p (lp - lq - RKL), -c_e p (lp + H_s) and c_y (1{v = y} - p), times
    1/temperature. The two logarithms are subtracted before anything multiplies them: close models would lose
    digits otherwise.
    """
    forward, reverse, entropy, logprob = (coefficients.to(dtype) / temperature).unbind(1)
    offset = forward - logprob - reverse * stats.reverse_kl - entropy * stats.student_entropy
    rows = [stats.student_lse, stats.teacher_lse, offset, reverse - entropy, entropy, forward, logprob]
    return torch.stack([row.to(dtype) for row in rows])
