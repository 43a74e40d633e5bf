"""Builds ``tiles.cpp`` and calls it on the tiles of ``tile_loop``."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from ..gemm import tile_extent
from ..native_build import BuildError, build_library, find_program

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")  # fmt: skip
_P, _N, _F, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES = {
    "stats": (_P, _P, _N, _N, _N, _P, _F, _P, _N, _THREADS),
    "entropy": (_P, _N, _N, _N, _P, _F, _P, _N, _THREADS),
    "topk": (_P, _N, _N, _N, _N, _F, _P, _P, _N, _THREADS),
    "gradient": (_P, _P, _N, _N, _N, _P, _F, _P, _N, _P, _N, _THREADS),
    "support_gradient": (_P, _N, _N, _N, _F, _P, _N, _P, _P, _N, _P, _N, _THREADS),
}
_MISSING = "no C++ compiler found; install g++ or clang++, or let CXX name one"
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    compiler, source = find_program("CXX", "c++", "g++", "clang++"), Path(__file__).with_name("tiles.cpp")
    try:
        library = ctypes.CDLL(
            str(build_library(compiler, _FLAGS, [source], missing=_MISSING, key=_processor()))
        )
    except (BuildError, OSError) as error:
        return f"the C++ tile kernels could not be built: {error}"
    for name, arguments in _SIGNATURES.items():
        for suffix in _SUFFIX.values():
            function = getattr(library, f"split_kl_{name}_{suffix}")
            function.argtypes, function.restype = list(arguments), None
    return library


class CpuTiles:
    """See :class:`tile_loop.TileKernels`. ``torch.get_num_threads()`` threads; results do not depend on it."""

    stats_keeps_tiles = True
    stats_scratch, entropy_scratch, gradient_scratch = 0, 0, 0

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}; move the tensors or choose another backend"
        library = _load()
        return library if isinstance(library, str) else None

    def stats(
        self, z: Tensor, w: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, state: Tensor
    ) -> None:
        _call("stats", z, w, *tile_extent(z), columns, scale, state, state.stride(0))

    def entropy(self, z: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, rows: Tensor) -> None:
        _call("entropy", z, *tile_extent(z), columns, scale, rows, rows.stride(0))

    def topk(
        self, z: Tensor, scratch: list[Tensor], first_id: int, scale: float, logits: Tensor, ids: Tensor
    ) -> None:
        _call("topk", z, *tile_extent(z), first_id, scale, logits, ids, logits.shape[1])

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
        _call("gradient", z, w, *tile_extent(z), columns, scale, scalars, scalars.stride(0), dz, dz.stride(0))

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
        count = columns.shape[1]
        _call("support_gradient", z, *tile_extent(z), scale, scalars, scalars.stride(0), columns, values, count, dz,
              dz.stride(0))  # fmt: skip


def _call(name: str, *arguments: Tensor | float) -> None:
    tile = arguments[0]
    assert isinstance(tile, Tensor)
    function = getattr(_load(), f"split_kl_{name}_{_SUFFIX[tile.dtype]}")
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    function(*values, torch.get_num_threads())
