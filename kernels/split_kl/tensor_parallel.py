"""States over the whole vocabulary from those of a tensor-parallel group's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .entropy_state import ENTROPY_ROWS, EntropyState, merge_entropy
from .state import merge

_State = TypeVar("_State")


@overload
def merge_tp(state: Tensor, group: dist.ProcessGroup | None) -> Tensor: ...
@overload
def merge_tp(state: EntropyState, group: dist.ProcessGroup | None) -> EntropyState: ...
def merge_tp(state: Tensor | EntropyState, group: dist.ProcessGroup | None) -> Tensor | EntropyState:
    """Gather, then fold the parts in rank order on every rank.

    The result is bitwise identical on all ranks, so every rank draws the same zones from it. One all_gather,
    and a second one for the ids of a top-k. ``group`` None or of one rank returns ``state`` itself.
    """
    if group is None or group.size() == 1:
        return state
    if isinstance(state, Tensor):
        return _fold(list(_gather(state, group).unbind(0)), merge)
    columns = [part for part in (state.topk_logits, state.gathered) if part is not None]
    packed = _gather(torch.cat([state.rows, *(part.t() for part in columns)]), group)
    topk = 0 if state.topk_logits is None else state.topk_logits.shape[1]
    ids = None if state.topk_ids is None else _gather(state.topk_ids, group)
    parts = []
    for rank, part in enumerate(packed.unbind(0)):
        rows, rest = part[:ENTROPY_ROWS], part[ENTROPY_ROWS:].t()
        parts.append(
            EntropyState(
                rows,
                rest[:, :topk] if topk else None,
                None if ids is None else ids[rank],
                None if state.gathered is None else rest[:, topk:],
            )
        )
    return _fold(parts, merge_entropy)


def sum_tp(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, T] added up over the ranks in their order, on every rank: the same bits on all of them."""
    if group is None or group.size() == 1:
        return sums
    return _fold(list(_gather(sums, group).unbind(0)), torch.add)


def _gather(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, columns] of every rank as [ranks, rows, columns]."""
    # gloo takes the concatenation along dimension 0 only, NCCL also the stack.
    gathered = packed.new_empty(group.size() * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed.contiguous(), group=group)
    return gathered.view(group.size(), *packed.shape)


def _fold(parts: Sequence[_State], combine: Callable[[_State, _State], _State]) -> _State:
    merged = parts[0]
    for part in parts[1:]:
        merged = combine(merged, part)
    return merged
