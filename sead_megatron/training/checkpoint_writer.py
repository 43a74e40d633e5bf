"""Writes a rank's share of a checkpoint while training goes on.

The share is copied to host memory at a step boundary; a thread then writes and syncs it. A thread and no process:
beside CUDA, NCCL and vLLM a fork is not safe, and a spawned process would need the state in shared memory (a container
has 64 MB of it), 200 MB and seconds for torch. Either outlives a killed rank and goes on writing into a directory that
the next job, which the run's record lock lets in, has taken over. The thread is in `write`, `fsync` or torch's C++
writer, all of which release the interpreter's lock; benchmarks/results/checkpoint.json has the time of a step with a
write under way and without. Megatron's asynchronous writers are such processes, and copy into new memory each time.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from sead_megatron.models.converted import sync
from sead_megatron.training.checkpoint_shards import Shard

# Of every tensor in the copy.
_ALIGNMENT = 64


class HostCopy:
    """Memory for copies of a rank's shards, reused from copy to copy; page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shards: Sequence[Shard]) -> list[Tensor]:
        """Copies of the shards, valid until the next call; each is a tensor with storage of its own size.

        (Torch's writer would clone what is part of a larger storage, and keep the clones.)
        """
        sizes = [shard.data.nbytes for shard in shards]
        starts, size = [], 0
        for part in sizes:
            starts.append(size)
            size += -(-part // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(shard.data.is_cuda for shard in shards)
        if self._memory.nbytes < size:
            self._allocate(size, lock=on_gpu)
        memory = self._memory.numpy()
        copies = []
        for shard, start in zip(shards, starts, strict=True):
            copy = torch.frombuffer(memory, dtype=shard.data.dtype, count=shard.data.numel(), offset=start)
            copies.append(copy.view(shard.sizes).copy_(shard.data, non_blocking=True))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _allocate(self, size: int, *, lock: bool) -> None:
        """Exactly `size` bytes: torch's own page-locked memory comes in powers of two. Never run on a GPU so far."""
        if self._memory.nbytes and self._memory.is_pinned():
            _check_cuda(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._memory = torch.empty(size, dtype=torch.uint8)
        if lock:
            _check_cuda(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))


def _check_cuda(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"page-locking the host memory of a checkpoint failed (CUDA error {int(code)})")


@dataclass(frozen=True, eq=False)
class WrittenFiles:
    """What a rank put on disk: enough for the index over all ranks."""

    items: list[WriteItem]
    places: list[WriteResult]
    seconds: float
    """From the start of the write to the last sync."""


class ShareWriter:
    """Writes one rank's files: `__RANK_0.distcp`, torch's format, and `rng_RANK.pt`."""

    def __init__(self, directory: Path, rank: int, shards: Sequence[Shard], copies: Sequence[Tensor]) -> None:
        self._directory = directory
        self._rank = rank
        self._data: dict[MetadataIndex, Tensor | io.BytesIO] = {}
        self._items: list[WriteItem] = []
        for shard, copy in zip(shards, copies, strict=True):
            properties, size = TensorProperties(dtype=copy.dtype), torch.Size(shard.global_shape)
            chunk = ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))
            index = MetadataIndex(shard.key, chunk.offsets)
            self._data[index] = copy
            self._items.append(
                WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
            )
        self._random_state = torch.get_rng_state()

    def add_object(self, key: str, content: object) -> None:
        """Something that is no tensor, in the way Megatron stores it."""
        buffer = io.BytesIO()
        torch.save([content], buffer)
        index = MetadataIndex(key)
        self._data[index] = buffer
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO))

    def write(self) -> WrittenFiles:
        """Writes the files and waits until they are on disk. Raises what the file system raises."""
        started = time.perf_counter()
        # Each rank for itself: on another node the directory may not be visible yet.
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            writer = FileSystemWriter(self._directory, per_thread_copy_ahead=0)
            plans = [SavePlan([])] * self._rank + [SavePlan(self._items)]
            plan = writer.prepare_global_plan(plans)[-1]
            places: list[WriteResult] = writer.write_data(plan, _CopyPlanner(self._data)).wait()
            random = self._directory / f"rng_{self._rank}.pt"
            torch.save({"torch": self._random_state}, random)
            sync(random)
            sync(self._directory)
        except Exception as error:
            # Torch's C++ writer does not say why a write failed.
            error.add_note(f"while writing {self._directory}: {_free_space(self._directory)}")
            raise
        self._data.clear()
        return WrittenFiles(self._items, places, time.perf_counter() - started)


class _CopyPlanner(DefaultSavePlanner):
    def __init__(self, data: Mapping[MetadataIndex, Tensor | io.BytesIO]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._data[write_item.index]


def write_index(directory: Path, ranks: Sequence[WrittenFiles]) -> None:
    """Writes `.metadata` over the files of all ranks."""
    entries: dict[str, STORAGE_TYPES] = {}
    for item in (item for rank in ranks for item in rank.items):
        if item.tensor_data is None:
            entries[item.index.fqn] = BytesStorageMetadata()
            continue
        data = item.tensor_data
        entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(data.chunk)
    FileSystemWriter(directory).finish(Metadata(entries), [rank.places for rank in ranks])


def _free_space(directory: Path) -> str:
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return f"the disk cannot be asked for its free space ({error.strerror})"
    return f"{status.f_bavail * status.f_frsize:,} bytes are free"
