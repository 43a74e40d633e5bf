"""From rollouts to the rows a model sees: balance over replicas, pack, shift the labels.

A row is one microbatch of several sequences in Megatron's ``thd`` format: ``[1, S]`` tokens, bounded by
``cu_seqlens``.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sead_megatron.data.types import Rollout

# Any valid id will do: padding is a segment of its own, which no sequence attends to.
_PADDING_ID = 0


def assign_to_replicas(lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Balances tokens over replicas: every sequence, longest first, goes to the replica with the fewest.

    Args:
        lengths: tokens of every sequence of the global batch, prompt and response together.
        num_replicas: data-parallel replicas.

    Returns:
        For each replica its indices into ``lengths``, ascending. With at least ``num_replicas`` sequences
        every replica has one. The largest load is at most 4/3 of the optimum (longest-processing-time rule,
        Graham 1969). Ties go to the replica with fewer sequences, then to the lower replica; between equal
        lengths the lower index goes first.

    Raises ValueError when ``num_replicas`` is not positive or a length is negative.
    """
    if num_replicas <= 0:
        raise ValueError(f"num_replicas must be positive, got {num_replicas}")
    if any(length < 0 for length in lengths):
        raise ValueError("a sequence cannot have a negative length")
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [(0, 0, replica) for replica in range(num_replicas)]  # tokens, sequences, replica
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, count, replica = loads[0]
        replicas[replica].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], count + 1, replica))
    return [sorted(replica) for replica in replicas]


def pack_rows(
    lengths: Sequence[int] | Mapping[int, int], indices: Sequence[int], max_tokens: int, packing: bool
) -> list[list[int]]:
    """Best-fit decreasing: every sequence, longest first, goes to the fullest row that still has room for it.

    Args:
        lengths: tokens by sequence index.
        indices: the sequences of one replica.
        max_tokens: the most tokens a row may hold (before ``build_row`` pads it).
        packing: False puts every sequence in a row of its own.

    Returns:
        Rows of indices, ascending in a row; rows ordered by their first index. Between equally full rows the
        older one is taken, between equal lengths the lower index goes first.

    Raises ValueError when a sequence is longer than ``max_tokens``.
    """
    for index in indices:
        if lengths[index] > max_tokens:
            raise ValueError(
                f"sequence {index} has {lengths[index]} tokens, a row holds {max_tokens}: "
                "max_tokens_per_microbatch must be at least prompt + max_new_tokens"
            )
    if not packing:
        return [[index] for index in sorted(indices)]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - length, row))
    return sorted(sorted(row) for row in rows)


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One microbatch (S positions with padding, n segments, R response tokens that are trained on).

    Attributes:
        tokens: int64 [1, S].
        position_ids: int64 [1, S], from 0 in every segment.
        cu_seqlens: int32 [n + 1], bounds of the segments, from 0 to S. Padding is a last segment of its own.
        max_seqlen: length of the longest segment, padding included.
        logit_rows: int64 [R], the position in the row whose hidden state predicts each response token.
        labels: int64 [R], the response tokens.
        token_index: int64 [R], their indices in the TokenTable.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    logit_rows: Tensor
    labels: Tensor
    token_index: Tensor


def build_row(
    row: Sequence[int], rollouts: Sequence[Rollout], table_offsets: Tensor | Sequence[int], pad_multiple: int
) -> PackedRow:
    """Lays the rollouts ``row`` end to end. Labels are shifted here and nowhere else.

    Args:
        row: indices into ``rollouts``, one segment each. Empty gives a row of padding only, ``pad_multiple``
            long, for a replica that has to take part in a microbatch without having a sequence left.
        rollouts: all rollouts of the global batch.
        table_offsets: ``TokenTable.offsets`` of the same rollouts.
        pad_multiple: S is rounded up to a multiple of it (sequence parallelism: the tensor-parallel size).

    A rollout of P prompt and R response tokens is a segment of P + R positions. Response token j stands at
    position P + j of its segment and is predicted by position P + j - 1; the hidden state of the last
    position predicts nothing. Only tokens that are trained on have a logit row.

    Raises ValueError when ``pad_multiple`` is not positive.
    """
    if pad_multiple <= 0:
        raise ValueError(f"pad_multiple must be positive, got {pad_multiple}")
    segments, logit_rows, token_index = [], [], []
    start = 0
    for index in row:
        rollout = rollouts[index]
        sequence = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        segments.append(torch.from_numpy(sequence).long())
        positions = torch.from_numpy(rollout.trained_positions)
        logit_rows.append(start + len(rollout.prompt_ids) - 1 + positions)
        token_index.append(int(table_offsets[index]) + torch.arange(len(positions)))
        start += rollout.length
    padding = -start % pad_multiple if row else pad_multiple
    if padding:
        segments.append(torch.full((padding,), _PADDING_ID, dtype=torch.int64))

    no_tokens = torch.empty(0, dtype=torch.int64)
    tokens = torch.cat(segments)
    all_rows = torch.cat([no_tokens, *logit_rows])
    bounds = torch.tensor([0] + [len(segment) for segment in segments]).cumsum(0)
    return PackedRow(
        tokens=tokens[None],
        position_ids=torch.cat([torch.arange(len(segment)) for segment in segments])[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(len(segment) for segment in segments),
        logit_rows=all_rows,
        labels=tokens[all_rows + 1],
        token_index=torch.cat([no_tokens, *token_index]),
    )
