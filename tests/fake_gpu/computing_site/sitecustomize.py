"""With FAKE_COMPUTE=1 every Python process computes on the fake GPU from the moment it imports torch.

For programs that start others as well: the launcher of a run, a check that gives each section a process. Transformer
Engine's kernels are no ATen operators and would compute nothing: the environment must have none, or hide it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _compute_torch(module: ModuleType) -> None:
    import computing
    import triton_on_host

    computing.install()
    triton_on_host.install()


def _compute_cuda_tiles(tiles: ModuleType) -> None:
    """The CUDA C++ tile kernels, built for the host: on the same memory, thousands of times slower."""
    from sead_kernels.split_kl.cuda.build import EMULATED

    tiles._architecture = lambda device_index: EMULATED  # type: ignore[attr-defined]


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "torch": _compute_torch,
    "sead_kernels.split_kl.cuda.tiles": _compute_cuda_tiles,
}


class _AfterImport(PathFinder):
    """Imports as usual, then changes what was imported."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _AFTER.get(fullname)
        spec = super().find_spec(fullname, path, target) if change else None
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


# A process without devices is the CPU's side of a comparison.
if os.environ.get("FAKE_COMPUTE") == "1" and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.meta_path.insert(0, _AfterImport)
