"""Reads the tensors of a Megatron distributed checkpoint under their Hugging Face names, without a process group.

Chunks are located by the checkpoint's own metadata and read one at a time, so any chunking will do: that of a
conversion, or that of the ranks of a run. Needs torch, not Megatron.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.converted import DCP_METADATA
from sead_megatron.models.layouts import Vocabulary
from sead_megatron.models.stored_layout import Box, Segment, StoredParameter, stored_parameters

# What loading a damaged pickle can raise (the pickle module's documentation), and damage that changes a type.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
_RESTORE = "restore the file, or convert the model again"


def read_metadata(directory: str | Path) -> Metadata:
    """The metadata of a distributed checkpoint whose files are all there; UserError otherwise."""
    path = Path(directory) / DCP_METADATA
    if not path.is_file():
        raise UserError(str(path), None, "missing", _RESTORE)
    try:
        metadata = FileSystemReader(directory).read_metadata()
        entries = list(metadata.storage_data.values())
    except (*_UNPICKLING_ERRORS, OSError) as error:
        raise UserError(str(path), None, f"cannot be read ({type(error).__name__})", _RESTORE) from error
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry.relative_path] = max(entry.offset + entry.length, ends.get(entry.relative_path, 0))
    for name, end in ends.items():
        file = Path(directory) / name
        if not file.is_file():
            raise UserError(str(file), None, f"missing; {DCP_METADATA} names it", _RESTORE)
        if (size := file.stat().st_size) < end:
            raise UserError(str(file), None, f"{size} bytes, must have {end} by {DCP_METADATA}", _RESTORE)
    return metadata


def find_parameters(directory: str | Path, config: HFConfig, metadata: Metadata) -> list[StoredParameter]:
    """The parameters of the model that `config` describes, all of which the checkpoint must hold and fill.

    Raises UserError for a tensor that is missing, has another shape or holes, or that the model does not have.
    """
    stored = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        # The optimizer's state in a checkpoint of a run, and a teacher that follows the student.
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(("optimizer.", "teacher."))
    }
    parameters = stored_parameters(config, not any(key.startswith("decoder.layers.0.") for key in stored))
    path = Path(directory) / DCP_METADATA
    for parameter in parameters:
        entry = stored.get(parameter.key)
        if entry is None:
            raise UserError(str(path), None, f"lacks {parameter.key}", "use a complete checkpoint")
        if not _fits(parameter, tuple(entry.size), config):
            raise UserError(
                f"{path}: {parameter.key}",
                list(entry.size),
                f"must have shape {list(parameter.global_shape)} by config.json",
                "make config.json and the weights belong together",
            )
    keys = {parameter.key for parameter in parameters}
    for key in sorted(keys):
        covered, wanted = (
            sum(math.prod(chunk.sizes) for chunk in stored[key].chunks),
            math.prod(stored[key].size),
        )
        if covered != wanted:
            constraint = f"its chunks hold {covered} of {wanted} elements"
            raise UserError(f"{path}: {key}", None, constraint, "use a complete checkpoint")
    if unread := sorted(stored.keys() - keys):
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        constraint = f"holds {unread[0]}{more}, which the architecture of config.json does not have"
        raise UserError(str(path), None, constraint, "make config.json and the weights belong together")
    return parameters


def _fits(parameter: StoredParameter, shape: tuple[int, ...], config: HFConfig) -> bool:
    if isinstance(parameter.layout, Vocabulary):
        # Padding depends on the TP that wrote it.
        return shape[1:] == parameter.global_shape[1:] and shape[0] >= config.vocab_size
    return shape == parameter.global_shape


@dataclass(frozen=True)
class _Chunk:
    """One layer's part of a stored chunk: its place in the layer's tensor, and the chunk's key in the metadata."""

    box: Box
    index: MetadataIndex
    layer: int = 0
    """Which of the chunk's layers; Megatron writes one a chunk, others may write a whole stack."""


class StoredTensors:
    """Random access to a model in a distributed checkpoint (a `layouts.TensorSource`)."""

    def __init__(self, directory: str | Path, config: HFConfig) -> None:
        """Reads the metadata. Raises UserError when checkpoint and config do not belong together."""
        self.directory = Path(directory)
        self._metadata = read_metadata(directory)
        self.parameters = find_parameters(directory, config, self._metadata)
        self._segments: dict[str, list[tuple[StoredParameter, Segment]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for parameter in self.parameters:
            self._shapes.update(parameter.hf_shapes)
            for segment in parameter.segments:
                self._segments.setdefault(segment.hf_name, []).append((parameter, segment))
        self._chunks: dict[tuple[str, int | None], list[_Chunk]] = {}
        for key in {parameter.key for parameter in self.parameters}:
            self._index_chunks(key)
        self._files: dict[str, BinaryIO] = {}
        self._last: tuple[MetadataIndex | None, Tensor] = (None, torch.empty(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def _index_chunks(self, key: str) -> None:
        stacked = any(parameter.key == key and parameter.layer is not None for parameter in self.parameters)
        for chunk in self._entry(key).chunks:
            index = MetadataIndex(key, chunk.offsets)
            if not stacked:
                self._chunks.setdefault((key, None), []).append(_Chunk(_box(chunk, 0), index))
                continue
            for layer in range(chunk.sizes[0]):
                part = _Chunk(_box(chunk, 1), index, layer)
                self._chunks.setdefault((key, chunk.offsets[0] + layer), []).append(part)

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type that a Hugging Face tensor is stored in."""
        parameter, _ = self._segments[name][0]
        return self._entry(parameter.key).properties.dtype

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim` (0 or 1) of a Hugging Face tensor, in storage of its own."""
        shape = list(self._shapes[name])
        stop = shape[dim] if stop is None else stop
        shape[dim] = stop - start
        first, last = (start, stop) if dim == 0 else (0, shape[0])
        out = torch.empty(shape, dtype=self.dtype(name))
        flat = out.view(shape[0], math.prod(shape[1:]))
        columns = (start, stop) if dim == 1 else (0, flat.shape[1])
        for parameter, segment in self._segments[name]:
            begin, end = max(first, segment.hf_start), min(last, segment.hf_start + segment.rows)
            if begin < end:
                shift = segment.start - segment.hf_start
                self._fill(flat[begin - first : end - first], parameter, begin + shift, columns)
        return out

    def padding(self, parameter: StoredParameter) -> Tensor:
        """The stored rows of the vocabulary that are no tokens: [rows, width]."""
        rows = self._entry(parameter.key).size[0]
        start = parameter.segments[-1].start + parameter.segments[-1].rows
        out = torch.empty((rows - start, parameter.width), dtype=self._entry(parameter.key).properties.dtype)
        self._fill(out, parameter, start, (0, parameter.width))
        return out

    def _fill(self, out: Tensor, parameter: StoredParameter, row: int, columns: tuple[int, int]) -> None:
        """Fills `out` with stored rows from `row` on and the columns [start, stop)."""
        rows = (row, row + out.shape[0])
        for chunk in self._chunks[parameter.key, parameter.layer]:
            r0, r1 = max(rows[0], chunk.box.row_start), min(rows[1], chunk.box.row_stop)
            c0, c1 = max(columns[0], chunk.box.column_start), min(columns[1], chunk.box.column_stop)
            if r0 < r1 and c0 < c1:
                stored = self._load(chunk)
                inner = slice(r0 - chunk.box.row_start, r1 - chunk.box.row_start)
                across = slice(c0 - chunk.box.column_start, c1 - chunk.box.column_start)
                out[r0 - row : r1 - row, c0 - columns[0] : c1 - columns[0]] = stored[inner, across]

    def _load(self, chunk: _Chunk) -> Tensor:
        """A part as [rows, columns]. The last chunk is kept: neighbouring segments lie in it."""
        if self._last[0] != chunk.index:
            place = self._metadata.storage_data[chunk.index]
            if place.relative_path not in self._files:
                self._files[place.relative_path] = (self.directory / place.relative_path).open("rb")
            file = self._files[place.relative_path]
            file.seek(place.offset)
            what = f"{self.directory / place.relative_path}: {chunk.index.fqn}"
            try:
                tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
            # What was overwritten is no zip archive, or no tensor.
            except (*_UNPICKLING_ERRORS, RuntimeError, OSError) as error:
                raise UserError(what, None, f"cannot be read ({type(error).__name__})", _RESTORE) from error
            self._last = (chunk.index, tensor)
        layer = self._last[1].reshape(-1, chunk.box.rows, chunk.box.columns)[chunk.layer]
        return layer

    def hf_names(self) -> Iterator[str]:
        """Every Hugging Face tensor, in the order of the layers."""
        yield from self._shapes


def _box(chunk: ChunkStorageMetadata, leading: int) -> Box:
    offsets: Any = tuple(chunk.offsets[leading:])
    sizes: Any = tuple(chunk.sizes[leading:])
    row, rows = offsets[0], sizes[0]
    column, columns = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
    return Box(row, row + rows, column, column + columns)
