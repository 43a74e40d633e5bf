"""Calls the CUDA tile kernels on the tiles of ``tile_loop``, on the current stream."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..native_build import BuildError
from ..native_tiles import NativeTiles
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


class CudaTiles(NativeTiles):
    """float32 tiles, dz in float32 or bf16; on the current stream of the tiles' device.

    Args:
        emulated: run the same source on the CPU (``emulation.h``), for tests; thousands of times slower.
        source: another version of the source, for tests of the tests.
    """

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

    def _dz_arguments(self, dz: Tensor) -> tuple[int, ...]:
        if dz.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"dz is {dz.dtype}, wanted bfloat16 or float32")
        return (int(dz.dtype == torch.bfloat16),)

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
