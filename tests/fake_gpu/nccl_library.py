"""NCCL through ctypes: what the self-test of the fake CUDA needs of it, with numpy arrays on both sides."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

UINT8, INT32, INT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT8 = 1, 2, 4, 6, 7, 8, 9, 10
SUM, PROD, MAX, MIN, AVG = range(5)
NO_COLOR = -1


class UniqueId(ctypes.Structure):
    """ncclUniqueId, which travels by value."""

    _fields_ = (("bytes", ctypes.c_char * 128),)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, nearest and ties to even, as uint16."""
    wide = values.astype(np.float32).view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Communicator:
    """One rank. Methods take and give arrays; `type` is NCCL's number where the array's dtype does not tell."""

    _types = {  # noqa: RUF012
        np.dtype(np.uint8): UINT8,
        np.dtype(np.int32): INT32,
        np.dtype(np.int64): INT64,
        np.dtype(np.float16): FLOAT16,
        np.dtype(np.float32): FLOAT32,
        np.dtype(np.float64): FLOAT64,
        np.dtype(np.uint16): BFLOAT16,
    }

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p, rank: int, ranks: int) -> None:
        self.library, self.handle, self.rank, self.ranks = library, handle, rank, ranks

    @classmethod
    def join(cls, library: ctypes.CDLL, id_file: Path, rank: int, ranks: int) -> Communicator:
        """Rank 0 makes the id and writes it to `id_file`; the others wait for the file."""
        unique = UniqueId()
        if rank == 0:
            succeed(library.ncclGetUniqueId(ctypes.byref(unique)))
            part = id_file.with_suffix(".part")
            part.write_bytes(ctypes.string_at(ctypes.byref(unique), 128))
            part.rename(id_file)
        else:
            while not id_file.exists():
                time.sleep(0.01)
            unique = UniqueId.from_buffer_copy(id_file.read_bytes())
        handle = ctypes.c_void_p()
        succeed(library.ncclCommInitRank(ctypes.byref(handle), ranks, unique, rank))
        return cls(library, handle, rank, ranks)

    def split(self, color: int, key: int) -> Communicator | None:
        """ncclCommSplit; None where the colour is NO_COLOR."""
        handle = ctypes.c_void_p()
        succeed(self.library.ncclCommSplit(self.handle, color, key, ctypes.byref(handle), None))
        if not handle:
            return None
        rank, ranks = ctypes.c_int(), ctypes.c_int()
        succeed(self.library.ncclCommUserRank(handle, ctypes.byref(rank)))
        succeed(self.library.ncclCommCount(handle, ctypes.byref(ranks)))
        return Communicator(self.library, handle, rank.value, ranks.value)

    def collective(
        self, name: str, source: np.ndarray, result: np.ndarray, *arguments: int, count: int, **options: Any
    ) -> np.ndarray:
        """nccl`name`(source, result, count, type, *arguments, communicator, stream)."""
        kind = options.get("type", self._types[source.dtype])
        function = getattr(self.library, f"nccl{name}")
        succeed(
            function(
                pointer(source), pointer(result), ctypes.c_size_t(count), kind, *arguments, self.handle, None
            )
        )
        return result

    def all_reduce(self, values: np.ndarray, operation: int, **options: Any) -> np.ndarray:
        return self.collective(
            "AllReduce", values, np.empty_like(values), operation, count=values.size, **options
        )

    def send(self, values: np.ndarray, peer: int) -> None:
        succeed(
            self.library.ncclSend(
                pointer(values), ctypes.c_size_t(values.nbytes), UINT8, peer, self.handle, None
            )
        )

    def receive(self, values: np.ndarray, peer: int) -> np.ndarray:
        succeed(
            self.library.ncclRecv(
                pointer(values), ctypes.c_size_t(values.nbytes), UINT8, peer, self.handle, None
            )
        )
        return values

    def destroy(self) -> None:
        succeed(self.library.ncclCommDestroy(self.handle))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Device memory is host memory in the fake CUDA, so any array will do."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def succeed(code: int) -> None:
    """Raises RuntimeError unless a call of CUDA or NCCL returned 0."""
    if code:
        raise RuntimeError(f"code {code}")


def load() -> ctypes.CDLL:
    """The library that FAKE_CUDA_LIB names, with the return types that ctypes cannot guess."""
    library = ctypes.CDLL(os.environ["FAKE_CUDA_LIB"])
    library.fake_counter.restype = ctypes.c_long
    library.fake_counter_name.restype = ctypes.c_char_p
    for name in ("memory_used", "memory_peak", "pinned_used", "pinned_peak"):
        getattr(library, f"fake_{name}").restype = ctypes.c_size_t
    return library
