"""Bytes of Megatron's gradient buffer and of the optimizer's state, exactly as megatron-core 0.16.1 to 0.19.2 lays
them out (`distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sead_megatron.plan.shards import ParameterShard

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes on one rank; the optimizer's state appears in the first update, its masters at the start."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    checkpoint: int
    """The rank's share of a checkpoint, at most: what its optimizer owns and its part of the replicas' copies."""


@dataclass(frozen=True)
class _Bucket:
    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    """Of its parameters, in elements of the buffer."""


def trained_bytes(
    parameters: Sequence[ParameterShard], element_bytes: int, *, data: int, data_rank: int, distributed: bool
) -> TrainedBytes:
    """What a rank of the trained model holds.

    Args:
        parameters: of its shard, in Megatron's order.
        element_bytes: of a parameter: 2 (bfloat16, with float32 masters) or 4 (no masters).
        data: data-parallel size.
        data_rank: which replica the rank belongs to.
        distributed: Megatron's distributed optimizer, which shards masters and moments over the replicas.
    """
    total = sum(parameter.numel for parameter in parameters)
    if not distributed:
        masters = 4 * total if element_bytes == 2 else 0
        share = math.ceil((element_bytes * total + masters + 8 * total) / data)
        return TrainedBytes(element_bytes * total, 4 * total, masters, 8 * total, share)
    buckets = _buckets(parameters, data)
    owned = sum(_owned(bucket, data, data_rank) for bucket in buckets)
    size = buckets[-1].end
    masters = 4 * owned if element_bytes == 2 else 0
    share = math.ceil(element_bytes * total / data) + masters + 8 * owned
    return TrainedBytes(element_bytes * size, 4 * size, masters, 8 * owned, share)


def _buckets(parameters: Sequence[ParameterShard], data: int) -> list[_Bucket]:
    """One bucket, from the last parameter to the first, and one of its own for a shared embedding."""
    divisor = math.lcm(data, _BUCKET_ALIGNMENT)
    buckets: list[_Bucket] = []
    spans: list[tuple[int, int]] = []

    def close() -> int:
        start = buckets[-1].end if buckets else 0
        buckets.append(_Bucket(start, _round_up(spans[-1][1], divisor), tuple(spans)))
        spans.clear()
        return buckets[-1].end

    position = 0
    for parameter in reversed(parameters):
        position = _round_up(position, _PARAMETER_ALIGNMENT)
        if parameter.shares_embedding and spans:
            position = close()
        spans.append((position, position + parameter.numel))
        position += parameter.numel
        if parameter.shares_embedding:
            position = close()
    if spans:
        close()
    return buckets


def _owned(bucket: _Bucket, data: int, data_rank: int) -> int:
    """Parameter elements in the equal share of the bucket that belongs to one replica."""
    share = (bucket.end - bucket.start) // data
    start = bucket.start + data_rank * share
    return sum(max(0, min(end, start + share) - max(begin, start)) for begin, end in bucket.spans)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
