"""The ``cuda`` backend: library GEMMs and CUDA C++ tile kernels, float32 statistics, bf16 or float32 dz."""

from .tiles import CudaTiles

__all__ = ["CudaTiles"]
