"""Calls the CUDA tile kernels on the tiles of ``tile_loop``, on the current stream."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..gemm import tile_extent
from ..native_build import BuildError
from .build import EMULATED, SOURCE, load


@functools.cache
def _load_or_reason(architecture: str, source: Path) -> ctypes.CDLL | str:
    try:
        return load(architecture, source)
    except (BuildError, OSError) as error:
        return f"the CUDA tile kernels could not be built: {error}"


@functools.cache
def _architecture(device_index: int) -> str:
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class CudaTiles:
    """See :class:`tile_loop.TileKernels`; float32 tiles, dz in float32 or bf16.

    Args:
        emulated: run the same source on the CPU (``emulation.h``), for tests; thousands of times slower.
        source: another version of the source, for tests of the tests.
    """

    stats_keeps_tiles = True
    stats_scratch, entropy_scratch, gradient_scratch = 0, 0, 0

    def __init__(self, *, emulated: bool = False, source: Path = SOURCE) -> None:
        self._emulated, self._source = emulated, source

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        wanted = "cpu" if self._emulated else "cuda"
        if device.type != wanted:
            return f"it wants tensors on {wanted}, not on {device.type}; choose another backend"
        if not self._emulated and not torch.cuda.is_available():
            return "no GPU is visible to torch; check the driver, or choose another backend"
        if dtype != torch.float32:
            return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}; use backend 'torch'"
        library = _load_or_reason(self._architecture_of(device), self._source)
        return library if isinstance(library, str) else None

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
        self._call("gradient", z, w, *tile_extent(z), columns, scale, scalars, scalars.stride(0), dz, dz.stride(0),
                   _is_bf16(dz))  # fmt: skip

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
                   columns.shape[1], dz, dz.stride(0), _is_bf16(dz))  # fmt: skip

    def _architecture_of(self, device: torch.device) -> str:
        if self._emulated:
            return EMULATED
        return _architecture(torch.cuda.current_device() if device.index is None else device.index)

    def _call(self, name: str, z: Tensor, *arguments: Tensor | float) -> None:
        library = load(self._architecture_of(z.device), self._source)
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in (z, *arguments)]
        function = getattr(library, f"split_kl_{name}")
        if self._emulated:
            status = function(*values, 0, None)
        else:
            # The library has a CUDA runtime of its own and sets the device itself; torch's is put back afterwards.
            with torch.cuda.device_of(z):
                status = function(*values, z.get_device(), torch.cuda.current_stream(z.device).cuda_stream)
        if status:
            raise RuntimeError(
                f"split_kl_{name}: CUDA error {status}: {library.split_kl_error(status).decode()}"
            )


def _is_bf16(dz: Tensor) -> int:
    """1 or 0; the kernels know no other dtype."""
    if dz.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"dz is {dz.dtype}, wanted bfloat16 or float32")
    return int(dz.dtype == torch.bfloat16)
