"""A checkpoint of a small bfloat16 model on the device restores every bit, and the next step goes on from there."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gpu_checks.pair import SMALL, TINY, config_of, write_pair
from gpu_checks.report import Context
from gpu_checks.step import SMALL_LOAD, TINY_LOAD, worst
from gpu_checks.world import Stepper, join_world
from sead_megatron.parallel.groups import destroy_groups
from sead_megatron.training.checkpoint import Checkpointer, FoundCheckpoint
from sead_megatron.training.checkpoint_files import check_checkpoint, checkpoint_path, read_state
from sead_megatron.training.checkpoint_reader import load_checkpoint

# Backward passes of attention may sum in any order on a GPU; bfloat16 weights then differ in some last bits.
NEXT_STEP = 1e-3


def run(context: Context) -> None:
    """Step, save, step; load into new models, step: restored state bit for bit, the second steps alike."""
    directory = context.directory / "checkpoint"
    directory.mkdir()
    shape, load = (SMALL, SMALL_LOAD) if context.large else (TINY, TINY_LOAD)
    write_pair(directory, shape, torch.bfloat16, context.device)
    report, device = context.report, join_world(context.device, directory)
    config = config_of(directory / "student", directory / "teacher", load, device, torch.bfloat16)

    first = Stepper.build(config, load, device)
    scores = first.score()
    first.train_step(scores)
    student = first.models.student
    started = time.perf_counter()
    state = {"step": 1, "weight_version": 1, "skipped_steps": 0, "skipped_in_a_row": 0}
    state |= {"schedule": student.optimizer.state_dict(), "curriculum": {}, "objective": {}}
    checkpoints = Checkpointer(directory, 1, student)
    checkpoints.save(1, state)
    report.number("blocked seconds", round(time.perf_counter() - started, 2))
    checkpoints.finish()
    path = checkpoint_path(directory, 1)
    report.number("save seconds", round(time.perf_counter() - started, 2))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    report.number("MiB", round(size / 2**20, 1))
    saved = first.weights() | optimizer_state(first)
    first.train_step(scores)
    expected = first.weights()
    destroy_groups()

    second = Stepper.build(config, load, device)
    started = time.perf_counter()
    check_checkpoint(path)
    found = FoundCheckpoint(path, read_state(path))
    load_checkpoint(found, second.models.student)
    second.models.student.optimizer.load_state_dict(found.state["schedule"])
    report.number("load seconds", round(time.perf_counter() - started, 2))
    restored = second.weights() | optimizer_state(second)
    different = [name for name, tensor in saved.items() if not same_bits(tensor, restored.get(name))]
    report.number("tensors", len(saved))
    if different:
        report.fail(f"{len(different)} of {len(saved)} tensors were not restored, {different[0]} first")
    second.train_step(second.score())
    error, name = worst(second.weights(), expected)
    report.compare("next step's weights", error, NEXT_STEP)
    report.number("next step's weights, worst", name)


def optimizer_state(stepper: Stepper) -> dict[str, Tensor]:
    """Float32 masters and moments of Megatron's optimizers in their own order, on the CPU."""
    megatron = stepper.models.student.optimizer.megatron
    state = {}
    for number, optimizer in enumerate(getattr(megatron, "chained_optimizers", [megatron])):
        inner = optimizer.optimizer
        masters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for index, master in enumerate(masters):
            label = f"optimizer {number} parameter {index}"
            state[f"{label} master"] = master.detach().cpu().clone()
            for name, value in inner.state[master].items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    state[f"{label} {name}"] = value.detach().cpu().clone()
    return state


def same_bits(tensor: Tensor, other: Tensor | None) -> bool:
    """Equal as bytes: NaN equals itself, 0 is not -0."""
    if other is None or tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
