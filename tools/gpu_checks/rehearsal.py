"""What a section needs where kernels do nothing: a preloaded library plays CUDA, copies are real, results are not.

Where a value decides what runs next, it is given one that goes on. Used with `--rehearse` (or FAKE_GPU=1) and nowhere
else; nothing that is computed is compared then.
"""

from __future__ import annotations

from typing import Any

import torch


def install(*, updates: bool) -> None:
    """Patches this process. The device's memory may hold anything, so no check of values may end the run.

    `updates`: gradients are applied whose norm nobody computed (needs Megatron-core).
    """
    import sead_kernels.split_kl.api as api
    import sead_kernels.split_kl.cuda.build as cuda_build

    # Launches must go through the library that was preloaded, not through a runtime linked in.
    cuda_build._NVCC_FLAGS = tuple("shared" if flag == "static" else flag for flag in cuda_build._NVCC_FLAGS)
    api.check_labels = lambda *arguments, **options: None
    _let_nonzero_find_every_second_row()
    if updates:
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
