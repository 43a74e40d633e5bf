"""The CUDA tile kernels on a device, driven by the check that was written for the host (`cuda/emulated_check.py`).

Its tiles, canaries and oracle are on the CPU. Whole storages travel, so that a write beside a tile is seen: the kernel
gets the view it would get, of a copy, and everything is copied back. Nothing but copies and our kernels is launched.

    python -m gpu_checks.device_tiles cuda|cpu      # exit code 1 where a kernel disagrees
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from sead_kernels.split_kl.cuda import CudaTiles
from sead_kernels.split_kl.cuda.emulated_check import (
    Case,
    Problems,
    check_gradients,
    check_pointwise,
    check_statistics,
    check_topk,
)
from torch import Tensor


class DeviceTiles:
    """`CudaTiles` for tensors on the CPU: each call moves them to the device and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tiles = CudaTiles(emulated=device.type == "cpu")

    def unavailable(self) -> str | None:
        """None, or why the kernels are not there."""
        return self._tiles.unavailable(self._device, torch.float32)

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._tiles, name)

        def call(*arguments: Any) -> None:
            moved: dict[int, tuple[Tensor, Tensor]] = {}
            method(*(self._moved(argument, moved) for argument in arguments))
            for original, copy in moved.values():
                original.copy_(copy)

        return call

    def _moved(self, argument: Any, moved: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """A tensor's view of its storage's copy; one copy of a storage that several arguments share."""
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage()
        if storage.data_ptr() not in moved:
            whole = torch.empty(0, dtype=argument.dtype).set_(storage)
            copy = torch.empty(whole.shape, dtype=whole.dtype, device=self._device)
            copy.copy_(whole)
            moved[storage.data_ptr()] = (whole, copy)
        copy = moved[storage.data_ptr()][1]
        return copy.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def check(device: torch.device) -> list[str]:
    """What the kernels get wrong on the device, each once.

    Raises RuntimeError where they are not available.
    """
    kernels, problems = DeviceTiles(device), Problems()
    reason = kernels.unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    for part in (check_statistics, check_topk, check_gradients, check_pointwise):
        part(kernels, Case(), problems)  # type: ignore[arg-type]
    return sorted(set(problems))


if __name__ == "__main__":
    found = check(torch.device(sys.argv[1]))
    print("\n".join(found) or "all kernels agree")
    sys.exit(bool(found))
