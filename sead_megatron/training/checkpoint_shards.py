"""What of a run's tensors this rank writes, and what it needs: boxes of global tensors, and no communication.

The distributed optimizer gives a rank a flat range of each parameter's shard. Such a range is at most 2N - 1 boxes of
the N-dimensional shard, and Megatron says where the shard lies in the global tensor, so that torch's distributed
checkpoint, which takes any boxes, stores it without a gather and reads it in any layout. Megatron's own formats gather
(`fully_reshardable`) or cannot change TP and PP (`dp_reshardable`); `fully_sharded_model_space` needs flattened ranges,
which megatron-core refuses since 0.16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from sead_megatron.training.moving_teacher import MovingTeacher
from sead_megatron.training.optimizer_state import MOMENTS, OwnedRange, is_sharded, owned_ranges
from sead_megatron.training.student import Student

# Keys of Megatron's own reshardable format; of the averages of a teacher that follows the student.
_OPTIMIZER = "optimizer.state."
_TEACHER = "teacher."

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes)"""


@dataclass(frozen=True, eq=False)
class Shard:
    """A box of a global tensor, and this rank's elements of it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]
    is_padded: bool
    """The global tensor's padding depends on the layout."""
    data: Tensor
    """Contiguous, of shape `sizes`; a view of the model's or optimizer's memory."""


@dataclass(frozen=True)
class _Piece:
    """A contiguous run of a parameter's elements, from `start` on, that is one box of a global tensor."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]
    is_padded: bool
    start: int

    def cut(self, prefix: str, begin: int, end: int, values: Tensor) -> Iterator[Shard]:
        """What of the parameter's elements [begin, end) lies in this piece; `values` [end - begin] are theirs."""
        first = max(begin, self.start)
        last = min(end, self.start + math.prod(self.sizes))
        position = first - begin
        for offsets, sizes in boxes_of_range(self.sizes, first - self.start, last - self.start):
            count = math.prod(sizes)
            yield Shard(
                f"{prefix}{self.key}",
                tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)),
                sizes,
                self.global_shape,
                self.is_padded,
                values[position : position + count].view(sizes),
            )
            position += count


def boxes_of_range(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The flat elements [begin, end) of a tensor as boxes, in order; at most 2N - 1 of N dimensions."""
    if begin >= end:
        return []
    if len(shape) == 1:
        return [((begin,), (end - begin,))]
    row = math.prod(shape[1:])

    def within(number: int, start: int, stop: int) -> list[Box]:
        inner = boxes_of_range(shape[1:], start, stop)
        return [((number, *offsets), (1, *sizes)) for offsets, sizes in inner]

    first, last = -(-begin // row), end // row
    if first > last:
        return within(last, begin - last * row, end - last * row)
    boxes = within(first - 1, begin - (first - 1) * row, row) if begin % row else []
    if first < last:
        boxes.append(((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return boxes + (within(last, 0, end % row) if end % row else [])


def dealt_ranges(sizes: Sequence[int], parts: int, part: int) -> list[tuple[int, int]]:
    """The range of each of several tensors in the `part`-th of `parts` equal parts of all their elements."""
    total = sum(sizes)
    begin, end = total * part // parts, total * (part + 1) // parts
    ranges, position = [], 0
    for size in sizes:
        ranges.append((min(max(begin - position, 0), size), min(max(end - position, 0), size)))
        position += size
    return ranges


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[_Piece]:
    """Where a parameter lies in global tensors; a factory (a gated first matrix) makes several boxes of it."""
    whole = entry.data
    pieces = []
    for part in [entry] if isinstance(entry, ShardedTensor) else nested_values(entry.build()):
        data = part.data
        if (
            not data.is_contiguous()
            or data.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        ):
            raise RuntimeError(f"{part.key} is no contiguous part of its parameter")
        pieces.append(
            _Piece(
                part.key,
                tuple(part.global_offset),
                (*[1] * part.prepend_axis_num, *part.local_shape),
                tuple(part.global_shape),
                part.allow_shape_mismatch,
                data.storage_offset() - whole.storage_offset(),
            )
        )
    return pieces


class ModelShards:
    """Where the parameters of this rank lie in the global tensors of a checkpoint."""

    def __init__(self, student: Student, moving: MovingTeacher | None) -> None:
        self._optimizer = student.optimizer.megatron
        self._moving = moving
        groups = student.model.groups
        self._replicas, self._replica = groups.layout.data, groups.dp_rank
        self._pieces: dict[Tensor, list[_Piece]] = {}
        self._written: set[Tensor] = set()
        self._names: dict[str, Tensor] = {}
        self.objects: dict[str, ShardedObject] = {}
        """What modules keep beside tensors (Transformer Engine's FP8 state), by the module's name of it."""
        for name, entry in student.model.module.sharded_state_dict().items():
            if isinstance(entry, ShardedObject):
                self.objects[name] = entry
                continue
            self._names[name] = entry.data
            self._pieces[entry.data] = _pieces(entry)
            # (pipeline copy, TP rank of what is not cut over TP, replica): equal copies on replicas share the work.
            if tuple(entry.replica_id[:2]) == (0, 0):
                self._written.add(entry.data)

    def needed(self, *, moments: bool) -> list[Shard]:
        """What this rank must have: its shard of the model, and of the optimizer's state what it owns."""
        whole = {parameter: (0, parameter.numel()) for parameter in self._pieces}
        shards = [
            shard for p, (a, b) in whole.items() for shard in self._cut("", p, a, b, p.detach().view(-1))
        ]
        for owned in owned_ranges(self._optimizer):
            shards += self._of_optimizer(owned, owned.start, owned.stop, moments=moments)
        return shards + self._averages(whole)

    def share(self, *, moments: bool) -> list[Shard]:
        """What this rank writes: each element of the run's state is in the share of one rank."""
        written = [parameter for parameter in self._pieces if parameter in self._written]
        parts = dealt_ranges([p.numel() for p in written], self._replicas, self._replica)
        dealt = dict(zip(written, parts, strict=True))
        shards = [
            shard for p, (a, b) in dealt.items() for shard in self._cut("", p, a, b, p.detach().view(-1)[a:b])
        ]
        for owned in owned_ranges(self._optimizer):
            if owned.parameter in dealt:
                start, stop = owned.start, owned.stop
                if not is_sharded(self._optimizer):
                    start, stop = dealt[owned.parameter]
                shards += self._of_optimizer(owned, start, stop, moments=moments)
        return shards + self._averages(dealt)

    def _cut(self, prefix: str, parameter: Tensor, start: int, stop: int, values: Tensor) -> Iterator[Shard]:
        for piece in self._pieces[parameter]:
            yield from piece.cut(prefix, start, stop, values)

    def _of_optimizer(self, owned: OwnedRange, start: int, stop: int, *, moments: bool) -> Iterator[Shard]:
        tensors = {"param": owned.master} if owned.has_own_master else {}
        if moments:
            tensors |= {name: owned.moment(name) for name in MOMENTS}
        for name, values in tensors.items():
            part = values[start - owned.start : stop - owned.start]
            yield from self._cut(f"{_OPTIMIZER}{name}.", owned.parameter, start, stop, part)

    def _averages(self, ranges: Mapping[Tensor, tuple[int, int]]) -> list[Shard]:
        averages = {} if self._moving is None else self._moving.averages
        shards: list[Shard] = []
        for name, average in averages.items():
            parameter = self._names[name]
            if parameter in ranges:
                start, stop = ranges[parameter]
                shards += self._cut(_TEACHER, parameter, start, stop, average.view(-1)[start:stop])
        return shards


def bytes_of(shards: Sequence[Shard]) -> int:
    """Bytes of the elements."""
    return sum(shard.data.nbytes for shard in shards)


def clear_padded(shards: Sequence[Shard]) -> None:
    """Zeros where a checkpoint of another layout may have no rows: the padding of the vocabulary."""
    with torch.no_grad():
        for shard in shards:
            if shard.is_padded:
                shard.data.zero_()
