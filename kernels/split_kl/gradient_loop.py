"""From tiles of dz = dL/dlogits to the gradients of hidden states and weight; shared by all backends.

Vocabulary windows are the outer loop and token tiles the inner one: a window of the weight is read (and, from
bf16, cast) once, and its weight gradient is complete when the window is left, so it is written once. The
[T, H] gradient of the hidden states is what is read and written again per window, in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gemm import accumulate, matmul, operand
from .tiling import TileOptions, spans

# (token rows, hidden rows [R, H] as a GEMM operand) -> dz [R, W] in the operands' dtype.
DzOfRows = Callable[[slice, Tensor], Tensor]


def accumulate_gradients(
    hidden: Tensor,
    weight: Tensor,
    open_window: Callable[[slice, Tensor], DzOfRows],
    *,
    valid_rows: int,
    dtype: torch.dtype,
    options: TileOptions,
    weight_grad: Tensor | None,
    weight_requires_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dh [T, H] in ``dtype``, dW in the weight's dtype or None), see :func:`api.linear_split_kl_grads`.

    ``open_window`` gets the window's rows of the weight and their values as a GEMM operand.
    """
    hidden_grad = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    fresh = torch.empty_like(weight) if weight_requires_grad and weight_grad is None else None
    if fresh is not None:
        fresh[valid_rows:] = 0
    target = weight_grad if weight_requires_grad and weight_grad is not None else fresh
    for window in spans(valid_rows, options.vocab):
        weight_rows = operand(weight[window], dtype)
        dz_of = open_window(window, weight_rows)
        total = None if target is None else _WindowTotal(target[window], fresh is not None, dtype)
        for rows in spans(hidden.shape[0], options.tokens):
            hidden_rows = operand(hidden[rows], dtype)
            dz = dz_of(rows, hidden_rows)
            accumulate(hidden_grad[rows], dz, weight_rows)
            if total is not None:
                total.add(dz, hidden_rows)
        if total is not None:
            total.close()
    return hidden_grad, fresh


class _WindowTotal:
    """A window's weight gradient, summed over the token tiles in the compute dtype.

    In the target itself if that has this dtype; else in a buffer, so that a bf16 target is rounded once per
    call and not once per token tile. ``fresh``: the target holds garbage and is overwritten.
    """

    def __init__(self, target: Tensor, fresh: bool, dtype: torch.dtype) -> None:
        self._target, self._fresh = target, fresh
        self._sum = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
        self._starts_here = fresh or self._sum is not target

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        if self._starts_here:
            matmul(dz.t(), hidden, self._sum)
        else:
            accumulate(self._sum, dz.t(), hidden)
        self._starts_here = False

    def close(self) -> None:
        if self._starts_here:  # no token tile
            self._sum.zero_()
        if self._sum is not self._target:
            self._target.copy_(self._sum) if self._fresh else self._target.add_(self._sum)
