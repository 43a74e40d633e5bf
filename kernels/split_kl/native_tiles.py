"""What the C++ and the CUDA tile kernels have in common: one C function per method of ``TileKernels``."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .gemm import tile_extent
from .pointwise import RuleNumbers


class NativeTiles(ABC):
    """See :class:`tile_kernels.TileKernels`. The kernels read logits and leave them as they are; no scratch."""

    stats_keeps_tiles = True
    stats_scratch, entropy_scratch, gradient_scratch, pointwise_scratch = 0, 0, 0, 0

    @abstractmethod
    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    @abstractmethod
    def _call(self, name: str, z: Tensor, *arguments: Tensor | float) -> None:
        """Call ``split_kl_<name>`` with pointers for tensors; dtype, device and threads are those of ``z``."""

    def _dz_arguments(self, dz: Tensor) -> tuple[int, ...]:
        """What a function wants to know of the dtype of ``dz``."""
        return ()

    def stats(
        self, z: Tensor, w: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, state: Tensor
    ) -> None:
        self._call("stats", z, w, *tile_extent(z), columns, scale, state, state.stride(0))

    def entropy(self, z: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, rows: Tensor) -> None:
        self._call("entropy", z, *tile_extent(z), columns, scale, rows, rows.stride(0))

    def topk(
        self, z: Tensor, scratch: list[Tensor], first_id: int, scale: float, logits: Tensor, ids: Tensor
    ) -> None:
        self._call("topk", z, *tile_extent(z), first_id, scale, logits, ids, logits.shape[1])

    def gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        columns: Tensor,
        scale: float,
        scalars: Tensor,
        dz: Tensor,
    ) -> None:
        self._call("gradient", z, w, *tile_extent(z), columns, scale, scalars, scalars.stride(0), dz,
                   dz.stride(0), *self._dz_arguments(dz))  # fmt: skip

    def support_gradient(
        self,
        z: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        columns: Tensor,
        values: Tensor,
        dz: Tensor,
    ) -> None:
        self._call("support_gradient", z, *tile_extent(z), scale, scalars, scalars.stride(0), columns, values,
                   columns.shape[1], dz, dz.stride(0), *self._dz_arguments(dz))  # fmt: skip

    def pointwise_stats(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        lse: Tensor,
        rule: RuleNumbers,
        sums: Tensor,
    ) -> None:
        self._call("pointwise_stats", z, w, *tile_extent(z), scale, lse, lse.stride(0), *rule, sums,
                   sums.stride(0))  # fmt: skip

    def pointwise_gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        rule: RuleNumbers,
        dz: Tensor,
    ) -> None:
        self._call("pointwise_gradient", z, w, *tile_extent(z), scale, scalars, scalars.stride(0), *rule, dz,
                   dz.stride(0), *self._dz_arguments(dz))  # fmt: skip
