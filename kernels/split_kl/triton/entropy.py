"""Pass 1 of one model: the GEMM, the streaming state and, in the same sweep, the K largest logits."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SENTINEL, logits_tile, update_model

_SCALARS = ["tokens", "valid_rows", "width", "split_rows", "first_id"]


@triton.jit
def store_rows(states, split, token, tokens, m, s, u):
    """One split's part of ``states`` [4, splits, T]."""
    live, stride = token < tokens, tokens.to(tl.int64) * tl.num_programs(0)
    out = states + split * tokens.to(tl.int64) + token
    tl.store(out, m, mask=live)
    tl.store(out + stride, s, mask=live)
    tl.store(out + 2 * stride, u, mask=live)


@triton.jit(do_not_specialize=_SCALARS)
def entropy_kernel(
    hidden,
    weight,
    states,
    tokens,
    valid_rows,
    width,
    split_rows,
    scale,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows m, s, u of ``states`` float32 [4, splits, T]; arguments and grid as for ``stats_kernel``."""
    split, first_token = tl.program_id(0), tl.program_id(1) * BT
    token = first_token + tl.arange(0, BT)
    m = tl.full((BT,), SENTINEL, tl.float32)
    s = tl.zeros((BT,), tl.float32)
    u = tl.zeros((BT,), tl.float32)
    end = tl.minimum((split + 1) * split_rows, valid_rows)
    for first_row in range(split * split_rows, end, BV):
        z = logits_tile(hidden, weight, first_token, first_row, width, BT, BV, BK) * scale
        column = first_row + tl.arange(0, BV)[None, :]
        m, s, u = update_model(m, s, u, tl.where(column < valid_rows, z, SENTINEL))
    store_rows(states, split, token, tokens, m, s, u)


@triton.jit
def logit_keys(z, ids, is_valid, EMPTY: tl.constexpr):
    """int64 keys of ``topk.encode_keys``; ``EMPTY`` where ``is_valid`` is False."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # + 0.0: the two zeros are equal logits
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    return tl.where(is_valid, keys, EMPTY)


@triton.jit
def key_logits(keys):
    """The float32 logits of ``logit_keys``."""
    ordered = (keys >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def merge_keys(best, keys, K: tl.constexpr):
    """The K largest of ``best`` [BT, K], ascending, and ``keys`` [BT, BV]; ascending."""
    # Ascending against descending, the larger of each pair: the K largest of both, as a bitonic sequence.
    best = tl.maximum(best, tl.topk(keys, K))
    if K > 1:
        best = tl.bitonic_merge(best)
    return best


@triton.jit(do_not_specialize=_SCALARS)
def topk_kernel(
    hidden,
    weight,
    states,
    best_keys,
    tokens,
    valid_rows,
    width,
    split_rows,
    first_id,
    scale,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """``states`` as ``entropy_kernel``, and ``best_keys`` int64 [splits, T, K], ascending.

    K is a power of two, at most BV. The tile is computed as [BV, BT] and transposed: keys of many tokens do not
    fit into registers, and the tensor cores want at least 64 rows. A tile of which no logit enters any token's
    list is not sorted; ids ascend within a split, so an equal logit never enters.
    """
    split, first_token = tl.program_id(0), tl.program_id(1) * BT
    token = first_token + tl.arange(0, BT)
    m = tl.full((BT,), SENTINEL, tl.float32)
    s = tl.zeros((BT,), tl.float32)
    u = tl.zeros((BT,), tl.float32)
    best = tl.full((BT, K), EMPTY, tl.int64)
    smallest = tl.full((BT,), SENTINEL, tl.float32)
    end = tl.minimum((split + 1) * split_rows, valid_rows)
    for first_row in range(split * split_rows, end, BV):
        z = tl.trans(logits_tile(weight, hidden, first_row, first_token, width, BV, BT, BK)) * scale
        column = first_row + tl.arange(0, BV)[None, :]
        z = tl.where(column < valid_rows, z, SENTINEL)
        entering = tl.sum((tl.max(z, 1) > smallest).to(tl.int32), 0)
        m, s, u = update_model(m, s, u, z)
        if entering > 0:
            best = merge_keys(best, logit_keys(z, column + first_id, column < valid_rows, EMPTY), K)
            smallest = key_logits(tl.min(best, 1))
    store_rows(states, split, token, tokens, m, s, u)
    row = split * tokens.to(tl.int64) + token
    slot = row[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(best_keys + slot, best, mask=token[:, None] < tokens)
