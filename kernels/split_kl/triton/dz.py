"""Pass 2: from hidden states and weights to a tile of dz = dL/dlogits; logits and probabilities stay in registers.

The grids are one program per tile, in the order of ``tiles.tile_of_program``. Persistent programs that loop over
tiles were compiled too: at 176 registers they spill (25 loads on sm_90, 17 on sm_100 against none), and without a
second tile in flight there is no epilogue to hide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import halves, logits_tile, rounded, tile_of_program

_SCALARS = ["tokens", "window", "student_width", "teacher_width", "width", "stride"]


@triton.jit
def load_scalars(scalars, row: tl.constexpr, stride, token, tokens):
    """Row ``row`` of ``scalars`` as a column [BT, 1]."""
    return tl.load(scalars + row * stride.to(tl.int64) + token, mask=token < tokens, other=0.0)[:, None]


@triton.jit
def pair_gradient(z, w, column, columns, scalars, stride, token, tokens, scale):
    """The gradient of ``row_scalars.pack_scalars`` for logits ``z``, ``w`` of the tokens and ``column`` [1, BV]."""
    log_p = z * scale - load_scalars(scalars, 0, stride, token, tokens)
    log_q = w * scale - load_scalars(scalars, 1, stride, token, tokens)
    offset = load_scalars(scalars, 2, stride, token, tokens)
    difference = load_scalars(scalars, 3, stride, token, tokens)
    entropy = load_scalars(scalars, 4, stride, token, tokens)
    forward = load_scalars(scalars, 5, stride, token, tokens)
    logprob = load_scalars(scalars, 6, stride, token, tokens)
    sampled = tl.load(columns + token, mask=token < tokens, other=-1)
    gradient = tl.exp(log_p) * (offset + difference * (log_p - log_q) - entropy * log_q)
    gradient -= forward * tl.exp(log_q)
    return gradient + tl.where(column == sampled[:, None], logprob, 0.0)


@triton.jit(do_not_specialize=_SCALARS)
def dz_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    columns,
    scalars,
    dz,
    tokens,
    window,
    student_width,
    teacher_width,
    stride,
    scale,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``dz`` [R, W] of R = ``tokens`` tokens and W = ``window`` vocabulary rows.

    Args:
        student_hidden, ..., teacher_weight: descriptors of [R, Hs], [W, Hs], [R, Ht], [W, Ht].
        columns: int32 [R], the sampled token's column of the window, anything outside [0, W) if it has none.
        scalars: float32 [7, R], row stride ``stride``. dz: descriptor, blocks [BT, BV/2]: entries outside
            [R, W] are not stored.
        scale: 1/temperature.
    """
    token_tile, vocab_tile = tile_of_program(tl.cdiv(tokens, BT), tl.cdiv(window, BV), GROUP)
    first_token, first_column = token_tile * BT, vocab_tile * BV
    z = logits_tile(student_hidden, student_weight, first_token, first_column, student_width, BT, BV, BK)
    w = logits_tile(teacher_hidden, teacher_weight, first_token, first_column, teacher_width, BT, BV, BK)
    token = first_token + tl.arange(0, BT)
    column = first_column + tl.arange(0, BV // 2)[None, :]
    # Two halves one after the other keep the registers of the elementwise work, and the store's buffer, small.
    z_left, z_right = halves(z, BT, BV)
    w_left, w_right = halves(w, BT, BV)
    left = pair_gradient(z_left, w_left, column, columns, scalars, stride, token, tokens, scale)
    dz.store([first_token, first_column], rounded(left, dz.dtype))
    column += BV // 2
    right = pair_gradient(z_right, w_right, column, columns, scalars, stride, token, tokens, scale)
    dz.store([first_token, first_column + BV // 2], rounded(right, dz.dtype))


@triton.jit(do_not_specialize=_SCALARS)
def support_dz_kernel(
    hidden,
    weight,
    scalars,
    dz,
    tokens,
    window,
    width,
    stride,
    scale,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``dz`` [R, W] = p (a + b ln p); ``scalars`` [3, R]: log-sum-exp, a, b. Other arguments as ``dz_kernel``."""
    token_tile, vocab_tile = tile_of_program(tl.cdiv(tokens, BT), tl.cdiv(window, BV), GROUP)
    first_token, first_column = token_tile * BT, vocab_tile * BV
    z = logits_tile(hidden, weight, first_token, first_column, width, BT, BV, BK)
    token = first_token + tl.arange(0, BT)
    lse = load_scalars(scalars, 0, stride, token, tokens)
    offset = load_scalars(scalars, 1, stride, token, tokens)
    slope = load_scalars(scalars, 2, stride, token, tokens)
    left, right = halves(z * scale - lse, BT, BV)
    dz.store([first_token, first_column], rounded(tl.exp(left) * (offset + slope * left), dz.dtype))
    gradient = tl.exp(right) * (offset + slope * right)
    dz.store([first_token, first_column + BV // 2], rounded(gradient, dz.dtype))
