"""Pass 1 of two models: both GEMMs and the streaming state in one kernel, no logits in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SENTINEL, logits_tile, update_pair


@triton.jit(do_not_specialize=["tokens", "valid_rows", "student_width", "teacher_width", "split_rows"])
def stats_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    states,
    tokens,
    valid_rows,
    student_width,
    teacher_width,
    split_rows,
    scale,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows 0 to 7 of ``states`` float32 [10, splits, T]: one program has BT tokens and one split's vocabulary.

    Args:
        student_hidden, ..., teacher_weight: descriptors of [T, Hs], [valid_rows, Hs], [T, Ht], [valid_rows, Ht].
        split_rows: vocabulary rows per split, a multiple of BV.
        scale: 1/temperature.

    Splits are the fast grid axis: programs that run together share rows of both matrices.
    """
    split, first_token = tl.program_id(0), tl.program_id(1) * BT
    token = first_token + tl.arange(0, BT)
    m_s = tl.full((BT,), SENTINEL, tl.float32)
    m_t = tl.full((BT,), SENTINEL, tl.float32)
    s_s = tl.zeros((BT,), tl.float32)
    u_s = tl.zeros((BT,), tl.float32)
    x_s = tl.zeros((BT,), tl.float32)
    s_t = tl.zeros((BT,), tl.float32)
    u_t = tl.zeros((BT,), tl.float32)
    x_t = tl.zeros((BT,), tl.float32)
    end = tl.minimum((split + 1) * split_rows, valid_rows)
    for first_row in range(split * split_rows, end, BV):
        z = (
            logits_tile(student_hidden, student_weight, first_token, first_row, student_width, BT, BV, BK)
            * scale
        )
        w = (
            logits_tile(teacher_hidden, teacher_weight, first_token, first_row, teacher_width, BT, BV, BK)
            * scale
        )
        column = first_row + tl.arange(0, BV)[None, :]
        z = tl.where(column < valid_rows, z, SENTINEL)
        w = tl.where(column < valid_rows, w, SENTINEL)
        m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t = update_pair(m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z, w)
    live, stride = token < tokens, tokens.to(tl.int64) * tl.num_programs(0)
    out = states + split * tokens.to(tl.int64) + token
    tl.store(out, m_s, mask=live)
    tl.store(out + stride, s_s, mask=live)
    tl.store(out + 2 * stride, u_s, mask=live)
    tl.store(out + 3 * stride, x_s, mask=live)
    tl.store(out + 4 * stride, m_t, mask=live)
    tl.store(out + 5 * stride, s_t, mask=live)
    tl.store(out + 6 * stride, u_t, mask=live)
    tl.store(out + 7 * stride, x_t, mask=live)
