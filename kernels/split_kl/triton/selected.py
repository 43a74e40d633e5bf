"""Single entries of a row: logits of given ids (pass 1) and gradients at given ids (pass 2)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded


@triton.jit(do_not_specialize=["count", "first_id", "valid_rows", "width"])
def gather_kernel(
    hidden,
    weight,
    ids,
    logits,
    count,
    first_id,
    valid_rows,
    width,
    scale,
    BG: tl.constexpr,
    BK: tl.constexpr,
):
    """``logits`` float32 [T, G] of ``ids`` int64 [T, G], G = ``count``; 0 for ids outside the shard's valid rows.

    hidden [T, H] and weight [Vl, H] are pointers: one program has one token and BG rows that lie far apart.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BG + tl.arange(0, BG)
    row = tl.load(ids + token * count + slot, mask=slot < count, other=-1) - first_id
    is_owned = (row >= 0) & (row < valid_rows)
    products = tl.zeros((BG, BK), tl.float32)
    for k in range(0, width, BK):
        column = k + tl.arange(0, BK)
        left = tl.load(hidden + token * width + column, mask=column < width, other=0.0)
        is_inside = is_owned[:, None] & (column < width)[None, :]
        right = tl.load(weight + row[:, None] * width + column[None, :], mask=is_inside, other=0.0)
        products += left.to(tl.float32)[None, :] * right.to(tl.float32)
    tl.store(logits + token * count + slot, tl.sum(products, 1) * scale, mask=slot < count)


@triton.jit(do_not_specialize=["count", "first_id", "window", "stride"])
def scatter_kernel(ids, values, dz, count, first_id, window, stride, BG: tl.constexpr):
    """``dz`` [R, W], row stride ``stride``, gets ``values`` [R, G] at columns ``ids`` [R, G] - ``first_id``.

    One program has one token and BG ids. Ids outside the window are skipped, the others of a row are distinct.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BG + tl.arange(0, BG)
    column = tl.load(ids + token * count + slot, mask=slot < count, other=-1) - first_id
    value = tl.load(values + token * count + slot, mask=slot < count, other=0.0)
    is_inside = (slot < count) & (column >= 0) & (column < window)
    tl.store(dz + token * stride + column, rounded(value, dz.dtype.element_ty), mask=is_inside)
