"""The implementations of the passes and how one is chosen."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .cpu import CpuTiles
from .cuda import CudaTiles
from .entropy_state import EntropyState
from .tile_loop import TiledBackend
from .torch_tiles import TorchTiles
from .triton import TritonBackend


class Backend(Protocol):
    """The six passes on checked arguments; signatures and contracts are those of ``TiledBackend``."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where it can run, else one sentence: why not and how to get it.

        ``dtype`` is the compute dtype, float32 or float64.
        """

    def stats(self, *args: object, **kwargs: object) -> Tensor: ...

    def entropy(self, *args: object, **kwargs: object) -> EntropyState: ...

    def gradients(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]: ...

    def support_gradients(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]: ...

    def pointwise_stats(self, *args: object, **kwargs: object) -> Tensor: ...

    def pointwise_gradients(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]: ...


# "auto" takes the first that is available for the device and dtype: native tile kernels around library GEMMs
# (one device each), then the fused Triton kernels (estimated slower on Hopper, not measured), plain torch last.
BACKENDS: dict[str, Backend] = {
    "cuda": TiledBackend(CudaTiles()),
    "cpu": TiledBackend(CpuTiles()),
    "triton": TritonBackend(),
    "torch": TiledBackend(TorchTiles()),
}


def describe_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What ``name`` comes to, and why "auto" came to plain torch where something faster is meant for the device."""
    chosen = backend_name(name, device, dtype)
    if name != "auto" or chosen != "torch":
        return chosen
    native = "cuda" if device.type == "cuda" else "cpu"
    return f"torch ({native} is unavailable: {BACKENDS[native].unavailable(device, dtype)})"


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend called ``name``; see :func:`backend_name`."""
    return BACKENDS[backend_name(name, device, dtype)]


def backend_name(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """``name`` itself, or what "auto" means for ``device`` and the compute dtype ``dtype``.

    Native libraries are built when this is first asked for on a machine, and cached.

    Raises:
        ValueError: unknown or unavailable; what is missing and how to get it.
    """
    if name == "auto":
        return next(key for key, backend in BACKENDS.items() if backend.unavailable(device, dtype) is None)
    if name not in BACKENDS:
        raise ValueError(f"options.backend is {name!r}, wanted one of {['auto', *BACKENDS]}")
    reason = BACKENDS[name].unavailable(device, dtype)
    if reason is not None:
        usable = [key for key, backend in BACKENDS.items() if backend.unavailable(device, dtype) is None]
        raise ValueError(
            f"options.backend {name!r} is unavailable for {dtype} on {device}: {reason}; usable here: {usable}"
        )
    return name
