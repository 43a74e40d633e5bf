"""Gradients that are dense and smooth but for a few vocabulary entries per token: those of top-k divergences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SupportGradient:
    """dL/dz of each token, before the factor 1/temperature, without the teacher's logits.

    dL/dz_v = ``values`` for the entries ``ids``, and p_v (``offset`` + ``slope`` ln p_v) for all others.

    Attributes:
        lse, offset, slope: [T]; the student's log-sum-exp, and a and b of the smooth part.
        ids: int64 [T, G] global vocabulary ids, distinct within a row but for ``topk.NO_ID``, an empty slot.
        values: [T, G].
    """

    lse: Tensor
    offset: Tensor
    slope: Tensor
    ids: Tensor
    values: Tensor

    def times(self, factor: Tensor) -> SupportGradient:
        """The gradient of ``factor`` (a scalar) times the loss."""
        return SupportGradient(
            self.lse, self.offset * factor, self.slope * factor, self.ids, self.values * factor
        )

    def scaled(self, inv_temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """([3, T] log-sum-exp, a, b; values [T, G]) with the factor 1/temperature, in ``dtype``."""
        rows = [self.lse, self.offset * inv_temperature, self.slope * inv_temperature]
        values = (self.values * inv_temperature).to(dtype).contiguous()
        return torch.stack([row.to(dtype) for row in rows]), values
