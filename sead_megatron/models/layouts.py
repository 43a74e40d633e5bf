"""How one Megatron parameter is made of Hugging Face tensors, and how it is cut over tensor-parallel ranks.

Each operation reads this rank's shard from a checkpoint without touching the rest of it, and merges all
shards back into the Hugging Face tensors, bit for bit. One table of them per model family serves load,
export and the per-step weight sync. Torch-free to import: the tables also say what a checkpoint must hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sead_megatron.models.architecture import HFConfig

if TYPE_CHECKING:
    from torch import Tensor


VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: a multiple of 128 (GEMM tiles) that the tensor-parallel size divides.

    The same for every TP that divides 128, so checkpoints move between layouts without reshaping.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel)
    return math.ceil(vocab_size / multiple) * multiple


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(tensors), dim)


class TensorSource(Protocol):
    """Random access to the tensors of a Hugging Face checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim`, everything in the other dimensions."""


class LayoutOp(Protocol):
    """One way of laying out Hugging Face tensors in a Megatron parameter."""

    @property
    def partition_dim(self) -> int | None:
        """The dimension that is cut over tensor-parallel ranks; None when every rank holds everything."""

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        """This tensor-parallel rank's shard, of `local_shape`."""

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        """The Hugging Face tensors from the shards of all tensor-parallel ranks, in fresh storage."""


class Replicated:
    """Every rank holds the whole tensor (norm weights)."""

    partition_dim = None

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        return source.read(names[0])

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        return [shards[0].clone()]


@dataclass(frozen=True)
class Split:
    """Cut evenly along one dimension: 0 for column-parallel, 1 for row-parallel linear layers."""

    dim: int

    @property
    def partition_dim(self) -> int:
        return self.dim

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        width = local_shape[self.dim]
        return source.read(names[0], self.dim, rank * width, (rank + 1) * width)

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        return [_cat(shards, self.dim)]


class Vocabulary:
    """Rows of the embedding or output layer, padded with zero rows to the model's padded vocabulary."""

    partition_dim = 0

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        stored = source.shape(names[0])[0]
        start, stop = (min(r * local_shape[0], stored) for r in (rank, rank + 1))
        rows = source.read(names[0], 0, start, stop)
        padding = local_shape[0] - rows.shape[0]
        return _cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        return [_cat(shards)[: config.vocab_size].clone()]


class GateUp:
    """`linear_fc1`: each rank holds [its rows of gate_proj ; its rows of up_proj]."""

    partition_dim = 0

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        width = local_shape[0] // 2
        return _cat([source.read(name, 0, rank * width, (rank + 1) * width) for name in names])

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_cat(parts) for parts in zip(*halves, strict=True)]


@dataclass(frozen=True)
class GroupedQKV:
    """`linear_qkv`: for each query group [its query heads ; its key head ; its value head], groups in order.

    The number of groups is read off the shapes, so layers may differ in it.
    """

    head_dim: int
    num_heads: int
    partition_dim = 0

    def read_shard(
        self, source: TensorSource, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> Tensor:
        groups = source.shape(names[1])[0] // self.head_dim // size
        parts = []
        for name in names:
            rows = source.shape(name)[0] // size
            part = source.read(name, 0, rank * rows, (rank + 1) * rows)
            parts.append(part.reshape(groups, -1, *part.shape[1:]))
        return _cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], config: HFConfig) -> list[Tensor]:
        full = _cat(shards)
        groups = (full.shape[0] // self.head_dim - self.num_heads) // 2
        heads_per_group = self.num_heads // groups
        grouped = full.reshape(groups, (heads_per_group + 2) * self.head_dim, *full.shape[1:])
        sizes = [heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.flatten(0, 1).clone() for part in grouped.split(sizes, dim=1)]
