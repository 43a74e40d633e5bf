"""The K largest logits of a row with their vocabulary ids: one order, whatever the tiles, shards and backends.

Order: larger logit first, among equal logits the smaller id. Tile kernels that keep a running list in one
register or atomic pack a float32 logit and its id into a sortable int64 *key*; see :func:`encode_keys`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One block of the CUDA kernel sorts K running and up to 1024 - K new keys; register tiles hold no more.
MAX_TOPK = 128

# Id of a slot that holds no token; larger than every vocabulary id, so that it loses ties.
NO_ID = 2**32 - 1


def encode_keys(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys of float32 logits and ids in [0, 2^32): larger key, earlier in the order.

    High 32 bits: the float's bits, negative ones flipped so that signed integers sort as the floats do. Low 32
    bits: 2^32 - 1 - id.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal logits
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(torch.int64) << 32) | (NO_ID - ids)


def decode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 logits, int64 ids) of :func:`encode_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), NO_ID - (keys & 0xFFFFFFFF)


def largest(logits: Tensor, count: int, first_id: int) -> tuple[Tensor, Tensor]:
    """The ``count`` first logits of each row and their ids; column j of ``logits`` [R, W] has id first_id + j."""
    values, columns = logits.topk(count, dim=1)
    # Which of several logits equal to the last one `topk` took is arbitrary: such rows are sorted whole. Finding
    # them synchronises a CUDA stream; the native backends do not come here.
    last = values[:, -1:]
    cut = ((logits == last).sum(1) > (values == last).sum(1)).nonzero()[:, 0]
    if cut.numel():
        columns[cut] = logits[cut].argsort(dim=1, descending=True, stable=True)[:, :count]
    columns = columns.sort(dim=1).values
    values, order = logits.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order) + first_id


def merge_largest(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` first of two lists (logits, ids), each in order, every id of ``left`` below those of ``right``."""
    values, order = torch.cat([left[0], right[0]], dim=1).sort(dim=1, descending=True, stable=True)
    ids = torch.cat([left[1], right[1]], dim=1).gather(1, order)
    return values[:, :count].contiguous(), ids[:, :count].contiguous()


def in_row(ids: Tensor, others: Tensor) -> Tensor:
    """bool [T, K]: whether ``others`` [T, K'] holds each of ``ids`` [T, K] in the same row; no [T, K, K'] tensor."""
    ordered = others.sort(dim=1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_(max=others.shape[1] - 1)
    return ordered.gather(1, place) == ids
