"""The whole state of a run on disk, complete or absent.

Model and optimizer go through Megatron's distributed checkpoint, which loads at another TP/PP/DP; everything
else (step, schedule, curriculum, objective, counters) is one small JSON file, and each rank's random state one file.
A checkpoint is written beside its final name, synced to disk and renamed by rank 0 when every rank is done.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from sead_megatron.errors import UserError
from sead_megatron.training.checkpoint_files import (
    STATE_FILE,
    checkpoint_path,
    checkpoint_steps,
    removal_remedy,
)
from sead_megatron.training.moving_teacher import MovingTeacher
from sead_megatron.training.student import Student

# The only sharding of the distributed optimizer's state that loads at any other layout.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def _partial_path(directory: Path, step: int) -> Path:
    return directory / f"{checkpoint_path(directory, step).name}.partial"


def _collect_results_in_this_process() -> None:
    """Gives Megatron a plain queue for what its writers report.

    Its own queue lives in a manager process of some 200 MB which survives a killed rank for good, and takes
    seconds to start (megatron-core 0.16.1). A synchronous save fills and empties the queue in one process.
    """
    filesystem_async._results_queue = queue.Queue()


def write_checkpoint(
    directory: Path, step: int, student: Student, state: dict[str, Any], moving: MovingTeacher | None = None
) -> None:
    """Writes everything of the checkpoint after `step` updates beside its final name (a collective over the world).

    `state` must be JSON data; only rank 0's is written. `moving`: of a teacher that follows the student.
    `commit_checkpoint` makes it count.
    """
    partial = _partial_path(directory, step)
    is_head = dist.get_rank() == 0
    if is_head:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _collect_results_in_this_process()
    dist_checkpointing.save(_sharded_state(student, moving, is_loading=False), str(partial))
    torch.save({"torch": torch.get_rng_state()}, partial / f"rng_{dist.get_rank()}.pt")
    dist.barrier()
    if is_head:
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        _sync_tree(partial)


def commit_checkpoint(directory: Path, step: int, keep: int) -> None:
    """Gives a written checkpoint its name and removes all but the newest `keep` (for rank 0)."""
    target = checkpoint_path(directory, step)
    # Left over from before a resume at an earlier step.
    shutil.rmtree(target, ignore_errors=True)
    _partial_path(directory, step).rename(target)
    _sync(directory)
    for old in checkpoint_steps(directory)[:-keep]:
        shutil.rmtree(checkpoint_path(directory, old))


def load_checkpoint(path: Path, student: Student, moving: MovingTeacher | None = None) -> None:
    """Restores models and optimizer (any layout) and, when the world has the same size, this rank's random state."""
    loaded = _load_sharded(path, student, moving)
    student.model.module.load_state_dict(loaded["model"])
    student.optimizer.megatron.load_state_dict(loaded["optimizer"])
    if moving is not None:
        moving.load(loaded["teacher"])
    rng = path / f"rng_{dist.get_rank()}.pt"
    if rng.exists():
        torch.set_rng_state(torch.load(rng)["torch"])


def _load_sharded(path: Path, student: Student, moving: MovingTeacher | None) -> dict[str, Any]:
    try:
        wanted = _sharded_state(student, moving, is_loading=True)
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    except (OSError, dist_checkpointing.core.CheckpointingException) as error:
        raise UserError(str(path), None, f"cannot be loaded ({error})", removal_remedy(path)) from error
    return loaded


def _sharded_state(student: Student, moving: MovingTeacher | None, *, is_loading: bool) -> dict[str, Any]:
    model = student.model.module.sharded_state_dict(metadata=dict(_RESHARDABLE))
    optimizer = student.optimizer.megatron.sharded_state_dict(
        model, is_loading=is_loading, metadata=dict(_RESHARDABLE)
    )
    state = {"model": model, "optimizer": optimizer}
    return state if moving is None else state | {"teacher": moving.sharded_state(model)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
