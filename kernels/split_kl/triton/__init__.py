"""The ``triton`` backend: fused GEMMs and statistics for Hopper and Blackwell, float32 accumulation."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
