"""Builds ``tiles.cpp`` and calls it on the tiles of ``tile_loop``."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from ..native_build import BuildError, build_library, find_program
from ..native_tiles import NativeTiles

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")  # fmt: skip
_P, _N, _F, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_RULE = [_F] * 5
_SIGNATURES = {
    "stats": (_P, _P, _N, _N, _N, _P, _F, _P, _N, _THREADS),
    "entropy": (_P, _N, _N, _N, _P, _F, _P, _N, _THREADS),
    "topk": (_P, _N, _N, _N, _N, _F, _P, _P, _N, _THREADS),
    "gradient": (_P, _P, _N, _N, _N, _P, _F, _P, _N, _P, _N, _THREADS),
    "support_gradient": (_P, _N, _N, _N, _F, _P, _N, _P, _P, _N, _P, _N, _THREADS),
    "pointwise_stats": (_P, _P, _N, _N, _N, _F, _P, _N, *_RULE, _P, _N, _THREADS),
    "pointwise_gradient": (_P, _P, _N, _N, _N, _F, _P, _N, *_RULE, _P, _N, _THREADS),
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
    compiler = find_program("CXX", "c++", "g++", "clang++")
    sources = [Path(__file__).with_name("tiles.cpp"), Path(__file__).parents[1] / "pointwise_rule.h"]
    try:
        library = ctypes.CDLL(
            str(build_library(compiler, _FLAGS, sources, missing=_MISSING, key=_processor()))
        )
    except (BuildError, OSError) as error:
        return f"the C++ tile kernels could not be built: {error}"
    for name, arguments in _SIGNATURES.items():
        for suffix in _SUFFIX.values():
            function = getattr(library, f"split_kl_{name}_{suffix}")
            function.argtypes, function.restype = list(arguments), None
    return library


class CpuTiles(NativeTiles):
    """On ``torch.get_num_threads()`` threads; results do not depend on it."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}; move the tensors or choose another backend"
        library = _load()
        return library if isinstance(library, str) else None

    def _call(self, name: str, z: Tensor, *arguments: Tensor | float) -> None:
        function = getattr(_load(), f"split_kl_{name}_{_SUFFIX[z.dtype]}")
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in (z, *arguments)]
        function(*values, torch.get_num_threads())
