"""What a section needs where kernels do nothing: a preloaded library plays CUDA, copies are real, results are not.

Where a value decides what runs next, it is given one that goes on. Used with `--rehearse` (or FAKE_GPU=1) and nowhere
else; nothing that is computed is compared then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN._local_scalar_dense.default, _ATEN.clone.default)


def install(*, updates: bool) -> None:
    """Patches this process. The device's memory may hold anything, so no check of values may end the run.

    `updates`: of a section that trains (needs Megatron-core): gradients are applied whose norm nobody computed.
    """
    import sead_kernels.split_kl.api as api
    import sead_kernels.split_kl.cuda.build as cuda_build

    # Launches must go through the library that was preloaded, not through a runtime linked in.
    cuda_build._NVCC_FLAGS = tuple("shared" if flag == "static" else flag for flag in cuda_build._NVCC_FLAGS)
    api.check_labels = lambda *arguments, **options: None
    # torch compiles this one at run time, by NVRTC, which is played too.
    torch.special.entr = lambda p: -(p * p.log())
    _let_nonzero_find_every_second_row()
    # No plan of cuDNN's is found for attention.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if updates:
        # Not for kernels alone: token ids that nobody wrote would be looked up.
        _IntegersOnTheCpu().__enter__()
        from sead_megatron.training.optimizer import StudentOptimizer

        step = StudentOptimizer.step
        StudentOptimizer.step = lambda self, *, loss_is_finite: step(self, loss_is_finite=True)


def _let_nonzero_find_every_second_row() -> None:
    nonzero = torch.Tensor.nonzero

    def every_second(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if self.is_cuda:
            return torch.arange(0, len(self), 2)[:, None].to(self.device)
        return nonzero(self, *arguments, **options)

    torch.Tensor.nonzero = every_second


class _IntegersOnTheCpu(TorchDispatchMode):
    """Lengths and offsets decide what runs next: what is made of whole numbers alone is computed, on copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        whole = bool(given) and all(t.is_cuda and not t.dtype.is_floating_point for t in given)
        if (
            not whole
            or func.namespace != "aten"
            or func._schema.is_mutable
            or func.is_view
            or func in _COPIES
        ):
            return func(*args, **(kwargs or {}))
        device = given[0].device
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), func(*args, **kwargs))
