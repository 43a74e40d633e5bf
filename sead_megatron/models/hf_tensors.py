"""Tensors of safetensors files read and written piece by piece, with memory for one piece.

Files are read, not mapped: pages of a mapped file count as this process's memory until the kernel takes them back.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from sead_megatron.errors import UserError
from sead_megatron.models.safetensors_index import SafetensorsIndex, TensorEntry

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8  # bytes, the format's own


class HFTensors:
    """Random access to the tensors of a Hugging Face directory (a `layouts.TensorSource`)."""

    def __init__(self, index: SafetensorsIndex) -> None:
        self._index = index
        self._files: dict[Path, BinaryIO] = {}
        self._block_key: tuple[str, int, int] | None = None
        self._block = torch.empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._index.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""
        return DTYPES[self._index.tensors[name].dtype]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim` (0 or 1) of a stored tensor; a view of a buffer that the next read of
        another block replaces."""
        entry = self._index.tensors[name]
        first, last = (start, stop) if dim == 0 else (0, None)
        last = entry.shape[0] if last is None else last
        if self._block_key != (name, first, last):
            # All columns of some rows serve every piece that is cut of them.
            self._block = self._read_rows(entry, first, last)
            self._block_key = (name, first, last)
        return self._block if dim == 0 else self._block[:, start:stop]

    def _read_rows(self, entry: TensorEntry, first: int, last: int) -> Tensor:
        block = torch.empty((last - first, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        row_bytes = (entry.end - entry.start) // entry.shape[0]
        if entry.file not in self._files:
            self._files[entry.file] = entry.file.open("rb", buffering=0)
        file = self._files[entry.file]
        file.seek(entry.start + first * row_bytes)
        _read_fully(file, as_bytes(block), entry.file)
        return block


def _read_fully(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise UserError(str(path), None, "ended while it was read", "see whether something rewrites it")
        buffer = buffer[count:]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def row_blocks(shape: Sequence[int], item_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of rows of at most `limit` bytes, or one row."""
    row_bytes = item_bytes
    for size in shape[1:]:
        row_bytes *= size
    step = max(1, limit // row_bytes)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@dataclass(frozen=True)
class HFTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Sequence[HFTensor], blocks: Iterator[Tensor], *, metadata: dict[str, str]
) -> None:
    """Writes one file from the row blocks of `tensors`, tensor after tensor (`aligned` gives the order), and waits
    until it is on disk."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        span = [end, end + tensor.bytes]
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for block in blocks:
            stream.write(as_bytes(block.contiguous()))
        stream.flush()
        if (written := stream.tell()) != 8 + len(text) + end:
            raise RuntimeError(f"{path} got {written} bytes instead of {8 + len(text) + end}")
        os.fsync(stream.fileno())


def aligned(tensors: Sequence[HFTensor]) -> list[HFTensor]:
    """Wide types first, otherwise in the given order: every tensor begins at a multiple of its item size."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
