"""What the kernels share: a tile of logits, the order of tiles, and the update of the streaming states.

Shapes inside kernels: BT tokens, BV vocabulary rows, BK columns of the hidden states per step of the GEMM.
Hidden states and weights come as TMA descriptors made on the host: they need no address registers and fill with
zeros beyond the edge of a tensor, so neither T, V nor the hidden size has to be a multiple of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import state

SENTINEL = tl.constexpr(state.SENTINEL)

# Triton 3.9's interpreter multiplies the bit patterns of bf16 operands as integers and truncates float32 to bf16.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def logits_tile(
    rows, columns, first_row, first_column, width, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr
):
    """float32 [BR, BC] products of rows of two matrices of ``width`` columns: hidden states and weight.

    In either order: the kernel of the top-k wants the vocabulary along the rows.
    """
    logits = tl.zeros((BR, BC), dtype=tl.float32)
    for k in range(0, width, BK):
        left = rows.load([first_row, k])
        right = columns.load([first_column, k])
        if INTERPRET:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        # On float32 operands the default would be TF32, which keeps three digits.
        precision: tl.constexpr = "ieee" if left.dtype == tl.float32 else "tf32"
        logits = tl.dot(left, right.T, logits, input_precision=precision)
    return logits


@triton.jit
def tile_of_program(token_tiles, vocab_tiles, GROUP: tl.constexpr):
    """(token tile, vocabulary tile) of this program: ``GROUP`` token tiles at a time go through all columns.

    Programs that run at the same time then read few distinct rows of either matrix, mostly from L2.
    """
    program = tl.program_id(0)
    group = program // (GROUP * vocab_tiles)
    within = program % (GROUP * vocab_tiles)
    height = tl.minimum(token_tiles - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def halves(tile, BT: tl.constexpr, BV: tl.constexpr):
    """The left and right columns of a tile [BT, BV]."""
    return tl.split(tl.permute(tl.reshape(tile, (BT, 2, BV // 2)), (0, 2, 1)))


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 ``values`` in ``dtype``, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def update_model(m, s, u, z):
    """Rows m, s, u [BT] of one model's state merged with logits ``z`` [BT, BV], SENTINEL where masked."""
    top = tl.maximum(m, tl.max(z, 1))
    shift = m - top
    old = tl.exp(shift)
    z -= top[:, None]
    mass = tl.exp(z)  # 0 for masked columns, and 0 times their finite logit is 0
    u = old * (u + shift * s) + tl.sum(mass * z, 1)
    s = old * s + tl.sum(mass, 1)
    return top, s, u


@triton.jit
def update_pair(m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z, w):
    """Rows 0 to 7 of a state of two models merged with logits ``z``, ``w`` [BT, BV], SENTINEL where masked."""
    top_s = tl.maximum(m_s, tl.max(z, 1))
    top_t = tl.maximum(m_t, tl.max(w, 1))
    z -= top_s[:, None]
    w -= top_t[:, None]
    shift_s, shift_t = m_s - top_s, m_t - top_t
    old_s, old_t = tl.exp(shift_s), tl.exp(shift_t)
    # x and u need the old s. One model after the other: both masses at once would not fit into registers.
    mass_s = tl.exp(z)
    x_s = old_s * (x_s + (shift_s - shift_t) * s_s) + tl.sum(mass_s * (z - w), 1)
    u_s = old_s * (u_s + shift_s * s_s) + tl.sum(mass_s * z, 1)
    s_s = old_s * s_s + tl.sum(mass_s, 1)
    mass_t = tl.exp(w)
    x_t = old_t * (x_t + (shift_s - shift_t) * s_t) + tl.sum(mass_t * (z - w), 1)
    u_t = old_t * (u_t + shift_t * s_t) + tl.sum(mass_t * w, 1)
    s_t = old_t * s_t + tl.sum(mass_t, 1)
    return top_s, s_s, u_s, x_s, top_t, s_t, u_t, x_t
