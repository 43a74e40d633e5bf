"""Takes up a checkpoint of a run in any layout: each rank reads the stored boxes that hold what it needs."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from sead_megatron.errors import UserError
from sead_megatron.models.converted import DCP_METADATA
from sead_megatron.training.checkpoint import FoundCheckpoint
from sead_megatron.training.checkpoint_files import (
    LATE_SECONDS,
    UNPICKLING_ERRORS,
    damaged,
    file_sizes,
    read_metadata,
    removal_remedy,
    wait_for_file,
)
from sead_megatron.training.checkpoint_shards import ModelShards, Shard, clear_padded
from sead_megatron.training.moving_teacher import MovingTeacher
from sead_megatron.training.optimizer_state import make_moments
from sead_megatron.training.student import Student


def load_checkpoint(found: FoundCheckpoint, student: Student, moving: MovingTeacher | None = None) -> None:
    """Restores models and optimizer (any layout) and, when the world has the same size, this rank's random state.

    For a student that has made no update yet. Raises UserError for a checkpoint that is damaged or another model's,
    or whose files this node does not show in time.
    """
    path = found.path
    updates = int(found.state["optimizer_updates"])
    if updates:
        make_moments(student.optimizer.megatron, updates)
    shards = ModelShards(student, moving)
    needed = shards.needed(moments=updates > 0)
    clear_padded(needed)
    wait_for_file(path / DCP_METADATA, 1, LATE_SECONDS)
    metadata = read_metadata(path)
    planner = _ReadPlanner(path, metadata, needed)
    planner.add_objects({MetadataIndex(entry.unique_key): name for name, entry in shards.objects.items()})
    read = {metadata.storage_data[item.storage_index].relative_path for item in planner.items}
    sizes = file_sizes(metadata)
    for file, size in ((name, sizes[name]) for name in sorted(read)):
        wait_for_file(path / file, size, LATE_SECONDS)
    reader = FileSystemReader(path)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        reader.read_data(LoadPlan(planner.items), planner).wait()
    except (*UNPICKLING_ERRORS, RuntimeError, OSError) as error:
        raise UserError(str(path), None, f"cannot be read ({error})", removal_remedy(path)) from error
    if planner.loaded:
        student.model.module.load_state_dict(planner.loaded, strict=False)
    if moving is not None:
        moving.publish()
    if found.state["world_size"] == dist.get_world_size():
        random = path / f"rng_{dist.get_rank()}.pt"
        wait_for_file(random, 1, LATE_SECONDS)
        torch.set_rng_state(torch.load(random)["torch"])


class _ReadPlanner(LoadPlanner):
    """Finds the stored boxes that hold the needed ones, and puts what is read of them in its place."""

    def __init__(self, path: Path, metadata: Metadata, needed: list[Shard]) -> None:
        self._path = path
        self._metadata = metadata
        self._targets: dict[MetadataIndex, Shard] = {}
        self._names: dict[MetadataIndex, str] = {}
        self.items: list[ReadItem] = []
        self.loaded: dict[str, Any] = {}
        """Objects by the names of `add_objects`."""
        by_key: dict[str, list[Shard]] = {}
        for shard in needed:
            by_key.setdefault(shard.key, []).append(shard)
            self._targets[MetadataIndex(shard.key, torch.Size(shard.offsets))] = shard
        for key, shards in by_key.items():
            self._add(key, shards)

    def _add(self, key: str, shards: list[Shard]) -> None:
        entry = self._metadata.state_dict_metadata.get(key)
        first = shards[0]
        if not isinstance(entry, TensorStorageMetadata):
            raise damaged(self._path / DCP_METADATA, f"lacks {key}")
        size = tuple(entry.size)
        fits = size[1:] == first.global_shape[1:] if first.is_padded else size == first.global_shape
        if not fits or entry.properties.dtype != first.data.dtype:
            stored = f"{key} is {list(size)} {entry.properties.dtype}"
            wanted = f"{list(first.global_shape)} {first.data.dtype}"
            raise damaged(self._path / DCP_METADATA, f"{stored}, must be {wanted}")
        chunks = [ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes)) for s in shards]
        items = create_read_items_for_chunk_list(key, entry, chunks)
        held = sum(math.prod(item.lengths) for item in items)
        whole = sum(_elements_within(shard, size) for shard in shards)
        if held != whole:
            raise damaged(self._path / DCP_METADATA, f"{key} holds {held} of {whole} elements")
        self.items += items

    def add_objects(self, names: dict[MetadataIndex, str]) -> None:
        """Reads objects too; `names`: what each is called in `loaded`."""
        self._names = names
        for index in names:
            if index.fqn not in self._metadata.state_dict_metadata:
                raise damaged(self._path / DCP_METADATA, f"lacks {index.fqn}")
            zero = torch.Size([0])
            self.items.append(ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a read box goes."""
        target = self._targets[read_item.dest_index].data
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Takes up an object."""
        (self.loaded[self._names[read_item.dest_index]],) = torch.load(value, weights_only=False)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """A box has been copied to its place."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Unused: the plan is made here."""

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads."""
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Unused."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Unused."""
        return central_plan


def _elements_within(shard: Shard, size: tuple[int, ...]) -> int:
    """Elements of a box that a tensor of this size has; padding beyond it is not stored."""
    ends = (min(o + n, limit) for o, n, limit in zip(shard.offsets, shard.sizes, size, strict=True))
    return math.prod(max(0, end - start) for start, end in zip(shard.offsets, ends, strict=True))
