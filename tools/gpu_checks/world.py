"""A world of one rank, and a training step in it.

Not by `sead_megatron.training.job`, whose import wants vLLM; what it does to the process is done here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_checks.pair import Load, fixed_coefficients, fixed_rollouts
from sead_megatron.config import TrainConfig
from sead_megatron.parallel import megatron_on_cpu
from sead_megatron.training.models import Models, build_models
from sead_megatron.training.step_plan import StepPlan, plan_step


def join_world(device: torch.device, directory: Path) -> torch.device:
    """A process group of this process alone: NCCL on a GPU, gloo on the CPU, where Megatron is redirected."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    store = f"file://{directory}/store_{os.getpid()}"
    if device.type == "cpu":
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        megatron_on_cpu.install()
        return device
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    arrived = torch.ones(1, device=device)
    dist.all_reduce(arrived)
    return device


@dataclass(frozen=True, eq=False)
class Stepper:
    """Models, and the plan of a step on fixed responses."""

    models: Models
    plan: StepPlan
    device: torch.device

    @classmethod
    def build(cls, config: TrainConfig, load: Load, device: torch.device) -> Stepper:
        """Builds both models from their directories."""
        models = build_models(config, device)
        vocabulary = models.student.model.config.vocab_size
        plan = plan_step(fixed_rollouts(load, vocabulary), models.student.model.groups.layout)
        return cls(models, plan, device)

    def score(self) -> Any:
        """The teacher's forward pass."""
        return self.models.teachers.score(self.plan)

    def token_stats(self, scores: Any) -> dict[str, Tensor]:
        """The student's forward pass and both output layers."""
        return self.models.student.token_stats(self.plan, scores)

    def train_step(self, scores: Any) -> Any:
        """Forward, loss, backward, optimizer."""
        coefficients = fixed_coefficients(self.plan.num_tokens, self.device)
        return self.models.student.train_step(self.plan, scores, coefficients)

    def gradients(self) -> dict[str, Tensor]:
        """Each parameter's accumulated gradient, float32, as the last step left it."""
        parameters = self.models.student.model.module.named_parameters()
        return {name: parameter.main_grad.detach().float().cpu().clone() for name, parameter in parameters}

    def weights(self) -> dict[str, Tensor]:
        """The student's parameters on the CPU."""
        parameters = self.models.student.model.module.named_parameters()
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters}
