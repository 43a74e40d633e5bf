"""The ``cpu`` backend: library GEMMs and vectorised C++ tile kernels, float32 and float64."""

from .tiles import CpuTiles

__all__ = ["CpuTiles"]
