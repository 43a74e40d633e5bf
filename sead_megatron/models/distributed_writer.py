"""Writes a model as a Megatron distributed checkpoint (`torch_dist`), one file at a time and without a process group.

The files are torch's own: each is written by its FileSystemWriter as if one rank had saved it, and the planner makes
each chunk when the writer asks for it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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

from sead_megatron.models.converted import DCP_METADATA, write_atomically
from sead_megatron.models.stored_layout import Box, StoredParameter, chunks

# Megatron's own files beside torch's: the format of the checkpoint, and what is no tensor (nothing here).
MEGATRON_FORMAT = "metadata.json"
MEGATRON_COMMON = "common.pt"
_FORMAT_CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class RowSource(Protocol):
    """Where Hugging Face tensors come from (`layouts.TensorSource` without shapes)."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim`."""


class DistributedWriter:
    """The checkpoint of a model whose parameters are spread over `files`."""

    INDEX_FILES = (DCP_METADATA, MEGATRON_FORMAT, MEGATRON_COMMON)

    def __init__(
        self,
        directory: Path,
        files: Sequence[Sequence[StoredParameter]],
        dtypes: Mapping[str, torch.dtype],
        chunk_bytes: int,
    ) -> None:
        self._directory = directory
        self._dtypes = dtypes
        # With a copy-ahead torch would hold chunks back on machines with a GPU.
        self._writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        self._writer.set_up_storage_writer(True)
        self._places: list[dict[MetadataIndex, tuple[StoredParameter, Box]]] = []
        self._entries: dict[str, STORAGE_TYPES] = {}
        plans = []
        for parameters in files:
            places: dict[MetadataIndex, tuple[StoredParameter, Box]] = {}
            items: list[WriteItem] = []
            for parameter in parameters:
                items += self._items(parameter, chunk_bytes, places)
            self._places.append(places)
            plans.append(SavePlan(items))
        self._plans = self._writer.prepare_global_plan(plans)

    @staticmethod
    def file_name(number: int) -> str:
        """Name that torch gives to the first file of a rank."""
        return f"__{number}_0.distcp"

    def _items(
        self,
        parameter: StoredParameter,
        chunk_bytes: int,
        places: dict[MetadataIndex, tuple[StoredParameter, Box]],
    ) -> list[WriteItem]:
        dtype = self._dtypes[parameter.key]
        properties, size = TensorProperties(dtype=dtype), torch.Size(parameter.global_shape)
        entry = self._entries.setdefault(parameter.key, TensorStorageMetadata(properties, size, []))
        assert isinstance(entry, TensorStorageMetadata)
        items = []
        for box in chunks(parameter, dtype.itemsize, chunk_bytes):
            chunk = ChunkStorageMetadata(torch.Size(parameter.offsets(box)), torch.Size(parameter.sizes(box)))
            index = MetadataIndex(parameter.key, chunk.offsets, len(entry.chunks))
            entry.chunks.append(chunk)
            places[index] = (parameter, box)
            data = TensorWriteData(chunk, properties, size)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        if (key := parameter.extra_state_key) is not None:
            self._entries[key] = BytesStorageMetadata()
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        return items

    def write_file(self, number: int, source: RowSource, advance: Callable[[int], None]) -> list[WriteResult]:
        """Writes one file and waits until it is on disk; returns where its chunks lie, for `finish`."""
        planner = _ChunkPlanner(self._places[number], self._dtypes, source, advance)
        results: list[WriteResult] = self._writer.write_data(self._plans[number], planner).wait()
        return results

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Writes the index over all files."""
        write_megatron_files(self._directory)
        self._writer.finish(Metadata(dict(self._entries)), results)


def write_megatron_files(directory: Path) -> None:
    """Writes what makes torch's files a checkpoint for Megatron, and waits until it is on disk."""
    common = io.BytesIO()
    torch.save({}, common)
    write_atomically(directory / MEGATRON_COMMON, common.getvalue())
    write_atomically(directory / MEGATRON_FORMAT, json.dumps(_FORMAT_CONTENT).encode())


class _ChunkPlanner(DefaultSavePlanner):
    """Makes each chunk when it is written and takes its memory back when the next one is due."""

    def __init__(
        self,
        places: Mapping[MetadataIndex, tuple[StoredParameter, Box]],
        dtypes: Mapping[str, torch.dtype],
        source: RowSource,
        advance: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._chunk_places = places
        self._chunk_dtypes = dtypes
        self._source = source
        self._advance = advance
        self._written: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return _empty_state()
        # Torch's writer keeps the last chunk of every name until the file is done (2.13).
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        parameter, box = self._chunk_places[write_item.index]
        chunk, filled = make_chunk(parameter, box, self._chunk_dtypes[parameter.key], self._source)
        self._advance(filled * chunk.itemsize)
        self._written = chunk
        return chunk.view(parameter.sizes(box))


def make_chunk(
    parameter: StoredParameter, box: Box, dtype: torch.dtype, source: RowSource
) -> tuple[Tensor, int]:
    """A chunk [rows, columns] and how many of its elements come from the source; the others are padding, zeros."""
    chunk = torch.zeros((box.rows, box.columns), dtype=dtype)
    filled = 0
    for segment in parameter.segments:
        start = max(box.row_start, segment.start)
        stop = min(box.row_stop, segment.start + segment.rows)
        if start >= stop:
            continue
        shift = segment.hf_start - segment.start
        rows = source.read(segment.hf_name, 0, start + shift, stop + shift)
        part = chunk[start - box.row_start : stop - box.row_start]
        part.copy_(rows.reshape(stop - start, parameter.width)[:, box.column_start : box.column_stop])
        filled += part.numel()
    return chunk, filled


def _empty_state() -> io.BytesIO:
    """What Megatron saves for a linear layer without a state."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer
