"""Megatron's optimizer and learning-rate schedule for the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sead_megatron.config import OptimizerConfig
from sead_megatron.models.build import BuiltModel
from sead_megatron.parallel.megatron_on_cpu import use_group_step_adam_without_fused


def wrap_for_training(model: BuiltModel, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """Megatron's DistributedDataParallel: float32 gradient buffers (`main_grad`), summed over replicas.

    Gradients are summed and not averaged (`calculate_per_token_loss`): the objective's normaliser is already global.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        # Non-finite gradients skip the step on all ranks (StudentOptimizer); Megatron's check would abort.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(
        model.module.config, config, model.module, pg_collection=model.groups.collection
    )


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. A skipped step has `applied` False and left the weights alone."""

    applied: bool
    grad_norm: float
    lr: float


class StudentOptimizer:
    """Adam with float32 master weights, gradient-norm clip, warm-up and decay, and skipped non-finite steps."""

    def __init__(
        self, config: OptimizerConfig, model: BuiltModel, ddp: DistributedDataParallel, total_steps: int
    ) -> None:
        dtype = next(model.module.parameters()).dtype
        self._clip = config.clip_grad
        use_group_step_adam_without_fused()
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=config.distributed,
                clip_grad=config.clip_grad,
            ),
            [ddp],
            use_gloo_process_groups=False,
            pg_collection=model.groups.collection,
        )
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            # Update s (0-based) runs at schedule point s + 1, so that warm-up does not start with a step at rate 0;
            # one more decay step keeps the last update above min_lr.
            lr_decay_steps=total_steps + 1,
            lr_decay_style=config.decay,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        """Clears the optimizer's gradients (the DDP buffers are cleared by their owner)."""
        self.megatron.zero_grad()

    def step(self, *, loss_is_finite: bool) -> StepResult:
        """Clips and applies the accumulated gradients, or skips when the loss or the gradient is not finite.

        `loss_is_finite` must be equal on all ranks; the gradient norm is global and therefore is.
        """
        self.schedule.step(1)
        lr = self.megatron.param_groups[0]["lr"]
        self.megatron.prepare_grads()
        # Without a clip threshold the norm is still wanted, for the log and for the finiteness check.
        grad_norm = float(
            self.megatron.clip_grad_norm(self._clip) if self._clip else self.megatron.get_grad_norm()
        )
        applied = loss_is_finite and math.isfinite(grad_norm)
        if applied:
            self.megatron.step_with_ready_grads()
        return StepResult(applied, grad_norm, float(lr))

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state; the optimizer's own goes through Megatron's distributed checkpoint."""
        return dict(self.schedule.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the schedule."""
        self.schedule.load_state_dict(state)
