"""How fast the training steps are: response tokens a second, and model FLOP/s against what the devices could do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from sead_megatron.data.types import Rollout
from sead_megatron.metrics import training_seconds
from sead_megatron.models.architecture import HFConfig
from sead_megatron.training.flops import device_peak_flops, step_flops
from sead_megatron.training.models import Models
from sead_megatron.training.step_plan import StepPlan

# The phases whose arithmetic `step_flops` counts.
_MODEL_PHASES = ("time/teacher", "time/stats", "time/update")


def throughput(
    times: Mapping[str, float], plan: StepPlan, models: Models, device: torch.device, *, measured: bool
) -> dict[str, float]:
    """`tokens_per_second`, and `mfu` where the device's peak is known.

    Args:
        times: what `Progress.take_times` gave for the step.
        measured: whether the student's forward-only pass ran.
    """
    speed = {"tokens_per_second": plan.num_tokens / max(training_seconds(times), 1e-9)}
    peak = device_peak_flops(device)
    if peak is not None:
        seconds = sum(times.get(phase, 0.0) for phase in _MODEL_PHASES)
        flops = step_flops(
            models.student.model.config, _tokens(plan.rollouts), _scored(plan, models), measured
        )
        speed["mfu"] = flops / (seconds * peak * dist.get_world_size())
    return speed


def _scored(plan: StepPlan, models: Models) -> Sequence[tuple[HFConfig, int]]:
    """Each frozen model and the prompt and response tokens that it scored."""
    members = models.teachers.members
    scored = [
        (member.config, _tokens([plan.teacher_rollouts[i] for i in plan.rollouts_of(number)]))
        for number, member in enumerate(members)
    ]
    if models.reference is not None:
        scored.append((models.reference.config, _tokens(plan.teacher_rollouts)))
    return scored


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.length for rollout in rollouts)
