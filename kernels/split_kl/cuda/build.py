"""Builds ``tiles.cu``: with nvcc for a GPU, or with a C++ compiler for the host (``emulation.h``).

``python -m sead_kernels.split_kl.cuda.build [sm_90a ...]`` builds ahead of time, e.g. in a container image.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
from pathlib import Path

from ..native_build import build_library, find_program

SOURCE = Path(__file__).with_name("tiles.cu")
ARCHITECTURES = ("sm_90a", "sm_100a")
EMULATED = "emulated"

# What the source includes, by path from its directory: a copy for a test has copies of them beside it.
HEADERS = ("pointwise.h", "../pointwise_rule.h")
EMULATION = "emulation.h"

NO_NVCC = "nvcc not found; install the CUDA toolkit, or let NVCC or CUDA_HOME name it"
_NO_COMPILER = "no C++ compiler found; install g++, or let CXX name it"
_COMMON = ("-std=c++17", "-shared")
_NVCC_FLAGS = (*_COMMON, "-O3", "-Xcompiler", "-fPIC", "-cudart", "static")
# An unaligned vector access aborts, as on a GPU.
_HOST_FLAGS = ("-x", "c++", *_COMMON, "-O1", "-fPIC", "-DSPLIT_KL_EMULATED", "-fsanitize=alignment",
               "-fno-sanitize-recover=all")  # fmt: skip

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_RULE = [_F] * 5
# Each followed by (device, stream).
_SIGNATURES = {
    "stats": (_P, _P, _N, _N, _N, _P, _F, _P, _N),
    "entropy": (_P, _N, _N, _N, _P, _F, _P, _N),
    "topk": (_P, _N, _N, _N, _N, _F, _P, _P, _I),
    "gradient": (_P, _P, _N, _N, _N, _P, _F, _P, _N, _P, _N, _I),
    "support_gradient": (_P, _N, _N, _N, _F, _P, _N, _P, _P, _I, _P, _N, _I),
    "pointwise_stats": (_P, _P, _N, _N, _N, _F, _P, _N, *_RULE, _P, _N),
    "pointwise_gradient": (_P, _P, _N, _N, _N, _F, _P, _N, *_RULE, _P, _N, _I),
}


def find_nvcc() -> list[str] | None:
    """$NVCC, then nvcc on PATH, then that of $CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return find_program("NVCC", "nvcc", f"{home}/bin/nvcc")


def build(architecture: str, source: Path = SOURCE) -> Path:
    """The shared library for ``architecture`` ("sm_90a", ... or "emulated").

    Raises:
        BuildError: no compiler (what to install), or its first error message.
    """
    sources = [source, *(source.parent / header for header in HEADERS)]
    if architecture == EMULATED:
        sources.append(source.parent / EMULATION)
        compiler = find_program("CXX", "g++", "c++")
        return build_library(compiler, _HOST_FLAGS, sources, missing=_NO_COMPILER)
    return build_library(find_nvcc(), (*_NVCC_FLAGS, f"-arch={architecture}"), sources, missing=NO_NVCC)


@functools.cache
def load(architecture: str, source: Path = SOURCE) -> ctypes.CDLL:
    """The loaded library with its functions declared; BuildError as :func:`build`."""
    library = ctypes.CDLL(str(build(architecture, source)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"split_kl_{name}")
        function.argtypes, function.restype = [*arguments, _I, _P], _I
    library.split_kl_error.argtypes, library.split_kl_error.restype = [_I], ctypes.c_char_p
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA tile kernels ahead of time.")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="default: %(default)s")
    for architecture in parser.parse_args().architectures:
        print(build(architecture))


if __name__ == "__main__":
    main()
