"""The whole state of a run on disk, complete or absent, written while training goes on.

Each rank writes what it owns of model and optimizer (`checkpoint_shards`) in torch's distributed format; everything
else (step, schedule, curriculum, objective, counters) is one small JSON file, and each rank's random state one file.
A checkpoint is written beside its final name and renamed by rank 0 when every rank's files are on disk.

Rank 0 alone looks at what is there and tells the others: a shared file system may show another node something older.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from sead_megatron.background import Background
from sead_megatron.models.converted import sync, write_atomically
from sead_megatron.models.distributed_writer import write_megatron_files
from sead_megatron.training.checkpoint_files import (
    FORMAT,
    STATE_FILE,
    checkpoint_path,
    checkpoint_steps,
    partial_path,
    read_state,
    remove_partials,
)
from sead_megatron.training.checkpoint_shards import ModelShards
from sead_megatron.training.checkpoint_writer import (
    HostCopy,
    ShareWriter,
    WrittenFiles,
    write_index,
)
from sead_megatron.training.moving_teacher import MovingTeacher
from sead_megatron.training.optimizer_state import applied_updates
from sead_megatron.training.student import Student


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest complete checkpoint of a run, equal on all ranks."""

    path: Path
    state: dict[str, Any]
    """Its small state: what `Checkpointer.save` was given."""

    @property
    def step(self) -> int:
        """Steps completed before it was written."""
        return int(self.state["step"])


def find_checkpoint(directory: Path) -> FoundCheckpoint | None:
    """The newest complete checkpoint in a directory, by rank 0's view of it (a collective over the world).

    What a killed job left unfinished is removed. Raises UserError on rank 0 for a checkpoint that cannot be used.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        remove_partials(directory)
        if steps := checkpoint_steps(directory):
            told = [(steps[-1], read_state(checkpoint_path(directory, steps[-1])))]
    dist.broadcast_object_list(told)
    if told[0] is None:
        return None
    step, state = told[0]
    return FoundCheckpoint(checkpoint_path(directory, step), state)


@dataclass(frozen=True, eq=False)
class _Write:
    """A checkpoint whose files are being written."""

    step: int
    state: str
    files: Background[WrittenFiles]


@dataclass(frozen=True, eq=False)
class _Written:
    """A checkpoint whose files are all on disk, which rank 0 has yet to commit."""

    step: int
    state: str
    ranks: list[WrittenFiles]


class Checkpointer:
    """The checkpoints that a run writes. Every method is a collective over the world, called at a step's end.

    Memory: a copy of this rank's share of the state, from the first checkpoint on, in host memory.
    """

    def __init__(
        self, directory: Path, keep: int, student: Student, moving: MovingTeacher | None = None
    ) -> None:
        """`moving`: of a teacher that follows the student. `keep`: how many checkpoints stay."""
        self._directory = directory
        self._keep = keep
        self._student = student
        self._moving = moving
        self._is_head = dist.get_rank() == 0
        self._copy = HostCopy()
        self._write: _Write | None = None
        self._written: _Written | None = None
        self._commit: Background[None] | None = None
        self._seconds: float | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is under way, so that `poll` has something to do."""
        return self._write is not None or self._commit is not None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies this rank's share of everything as it is after `step` steps, and starts to write it.

        `state` must be JSON data; only rank 0's counts. An earlier checkpoint is committed first, which may mean to
        wait for it. Raises what an earlier write raised.
        """
        self.finish()
        updates = applied_updates(self._student.optimizer.megatron)
        shards = ModelShards(self._student, self._moving)
        share = shards.share(moments=updates > 0)
        partial = partial_path(self._directory, step)
        writer = ShareWriter(partial, dist.get_rank(), share, self._copy.take(share))
        for entry in shards.objects.values():
            if is_main_replica(entry.replica_id):
                writer.add_object(entry.unique_key, entry.data)
        ours = {"format": FORMAT, "world_size": dist.get_world_size(), "optimizer_updates": updates}
        self._write = _Write(
            step, json.dumps(state | ours, indent=1) + "\n", Background(writer.write, "checkpoint")
        )

    def poll(self) -> None:
        """Commits the checkpoint that is under way when every rank's files are on disk. Raises what a write raised."""
        if self._commit is not None and self._commit.is_done:
            self._end_commit()
        if self._write is None:
            return
        is_done = self._write.files.is_done
        if is_done:
            self._write.files.result()
        everywhere = torch.tensor(int(is_done), device=self._student.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if everywhere.item():
            self.wait()
            self._start_commit()

    def wait(self) -> None:
        """Waits until the files of the checkpoint that is under way are on every rank's disk; it is not committed."""
        if self._write is None:
            return
        write, self._write = self._write, None
        files = write.files.result()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(files, ranks if self._is_head else None)
        if self._is_head:
            self._seconds = max(rank.seconds for rank in ranks)
            self._written = _Written(write.step, write.state, ranks)

    def finish(self) -> None:
        """Commits the checkpoint that is under way and waits for it (on rank 0)."""
        self.wait()
        if self._commit is not None:
            self._end_commit()
        self._start_commit()
        if self._commit is not None:
            self._end_commit()

    def take_metrics(self) -> dict[str, float]:
        """On rank 0, once: seconds of the slowest rank's write, when one has ended since the last call."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"checkpoint/write_seconds": seconds}

    def _start_commit(self) -> None:
        """Rank 0 does the rest in the background too: removing an old checkpoint takes time."""
        if self._written is not None:
            written, self._written = self._written, None
            self._commit = Background(lambda: self._complete(written), "checkpoint")

    def _end_commit(self) -> None:
        commit, self._commit = self._commit, None
        if commit is not None:
            commit.result()

    def _complete(self, written: _Written) -> None:
        partial = partial_path(self._directory, written.step)
        write_index(partial, written.ranks)
        write_megatron_files(partial)
        write_atomically(partial / STATE_FILE, written.state.encode())
        commit_checkpoint(self._directory, written.step, self._keep)


def commit_checkpoint(directory: Path, step: int, keep: int) -> None:
    """Gives a written checkpoint its name and removes all but the newest `keep` (for rank 0)."""
    target = checkpoint_path(directory, step)
    # Left over from before a resume at an earlier step.
    shutil.rmtree(target, ignore_errors=True)
    partial_path(directory, step).rename(target)
    sync(directory)
    for old in checkpoint_steps(directory)[:-keep]:
        shutil.rmtree(checkpoint_path(directory, old))
