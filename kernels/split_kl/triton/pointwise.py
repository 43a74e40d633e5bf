"""Pointwise divergences: both GEMMs and the rule in one kernel per sweep; the formulas are derived in ``..pointwise``.

The rule comes as five numbers at run time: one compiled kernel for all kinds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dz import load_scalars
from .tiles import SENTINEL, halves, logits_tile, rounded, tile_of_program

_SCALARS = ["tokens", "window", "valid_rows", "student_width", "teacher_width", "split_rows", "stride"]


@triton.jit
def pointwise_entries(log_p, log_q, teacher_term, student_term, log_teacher, log_student, clip):
    """(min(f, clip), p g, p, |p - q|) of every entry."""
    p, q, ratio = tl.exp(log_p), tl.exp(log_q), log_p - log_q
    lean = ratio + (log_student - log_teacher)  # ln(s p) - ln(t q)
    e = tl.exp(-tl.abs(lean))
    share = tl.where(lean > 0, 1.0, e) / (1 + e)
    log_sum = tl.log(1 + e)
    # Comparisons, not minima: those would lose a NaN.
    far_p, far_q = ratio - log_teacher, -ratio - log_student
    p_over_m = tl.where(far_p > -log_student, -log_student, far_p) - log_sum
    q_over_m = tl.where(far_q > -log_teacher, -log_teacher, far_q) - log_sum
    teacher, student = teacher_term * q, student_term * p
    value = teacher * q_over_m + student * p_over_m
    moment = student * (p_over_m + (1 - share)) - teacher * share
    is_clamped = value > clip
    return tl.where(is_clamped, clip, value), tl.where(is_clamped, 0.0, moment), p, tl.abs(p - q)


@triton.jit
def entry_sums(
    z,
    w,
    is_valid,
    student_lse,
    teacher_lse,
    scale,
    teacher_term,
    student_term,
    log_teacher,
    log_student,
    clip,
):
    """Sums over the columns of ``pointwise_entries`` of logits ``z``, ``w``."""
    # Masked entries have p = q = 0 and a ratio of 0: they add 0.
    log_p = tl.where(is_valid, z * scale - student_lse, SENTINEL)
    log_q = tl.where(is_valid, w * scale - teacher_lse, SENTINEL)
    value, moment, p, gap = pointwise_entries(
        log_p, log_q, teacher_term, student_term, log_teacher, log_student, clip
    )
    return tl.sum(value, 1), tl.sum(moment, 1), tl.sum(p, 1), tl.sum(gap, 1)


@triton.jit(do_not_specialize=_SCALARS)
def pointwise_stats_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    scalars,
    states,
    tokens,
    valid_rows,
    student_width,
    teacher_width,
    split_rows,
    stride,
    scale,
    teacher_term,
    student_term,
    log_teacher,
    log_student,
    clip,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """``states`` float32 [4, splits, T], rows ``pointwise.SUMS``; arguments and grid as for ``stats_kernel``.

    Args:
        scalars: float32 [2, T], row stride ``stride``: log-sum-exps of student and teacher.
        teacher_term ... clip: of ``pointwise.RuleNumbers``.
    """
    split, first_token = tl.program_id(0), tl.program_id(1) * BT
    token = first_token + tl.arange(0, BT)
    student_lse = load_scalars(scalars, 0, stride, token, tokens)
    teacher_lse = load_scalars(scalars, 1, stride, token, tokens)
    divergence = tl.zeros((BT,), tl.float32)
    moment = tl.zeros((BT,), tl.float32)
    mass = tl.zeros((BT,), tl.float32)
    gap = tl.zeros((BT,), tl.float32)
    end = tl.minimum((split + 1) * split_rows, valid_rows)
    for first_row in range(split * split_rows, end, BV):
        z = logits_tile(student_hidden, student_weight, first_token, first_row, student_width, BT, BV, BK)
        w = logits_tile(teacher_hidden, teacher_weight, first_token, first_row, teacher_width, BT, BV, BK)
        column = (first_row + tl.arange(0, BV // 2))[None, :]
        z_left, z_right = halves(z, BT, BV)
        w_left, w_right = halves(w, BT, BV)
        v, g, p, d = entry_sums(
            z_left, w_left, column < valid_rows, student_lse, teacher_lse, scale,
            teacher_term, student_term, log_teacher, log_student, clip,
        )  # fmt: skip
        divergence, moment, mass, gap = divergence + v, moment + g, mass + p, gap + d
        v, g, p, d = entry_sums(
            z_right, w_right, column + BV // 2 < valid_rows, student_lse, teacher_lse, scale,
            teacher_term, student_term, log_teacher, log_student, clip,
        )  # fmt: skip
        divergence, moment, mass, gap = divergence + v, moment + g, mass + p, gap + d
    live, row = token < tokens, tokens.to(tl.int64) * tl.num_programs(0)
    out = states + split * tokens.to(tl.int64) + token
    tl.store(out, divergence, mask=live)
    tl.store(out + row, moment, mask=live)
    tl.store(out + 2 * row, mass, mask=live)
    tl.store(out + 3 * row, gap, mask=live)


@triton.jit
def entry_gradient(
    z, w, scalars, stride, token, tokens, scale, teacher_term, student_term, log_teacher, log_student, clip
):
    """c (p g - p M) for logits ``z``, ``w`` of the tokens; ``scalars`` [4, R] of ``pack_pointwise_scalars``."""
    log_p = z * scale - load_scalars(scalars, 0, stride, token, tokens)
    log_q = w * scale - load_scalars(scalars, 1, stride, token, tokens)
    _, moment, p, _ = pointwise_entries(
        log_p, log_q, teacher_term, student_term, log_teacher, log_student, clip
    )
    mean = load_scalars(scalars, 2, stride, token, tokens)
    return load_scalars(scalars, 3, stride, token, tokens) * (moment - p * mean)


@triton.jit(do_not_specialize=_SCALARS)
def pointwise_dz_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    scalars,
    dz,
    tokens,
    window,
    student_width,
    teacher_width,
    stride,
    scale,
    teacher_term,
    student_term,
    log_teacher,
    log_student,
    clip,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``dz`` [R, W]; ``scalars`` float32 [4, R], other arguments as ``dz_kernel`` and above."""
    token_tile, vocab_tile = tile_of_program(tl.cdiv(tokens, BT), tl.cdiv(window, BV), GROUP)
    first_token, first_column = token_tile * BT, vocab_tile * BV
    z = logits_tile(student_hidden, student_weight, first_token, first_column, student_width, BT, BV, BK)
    w = logits_tile(teacher_hidden, teacher_weight, first_token, first_column, teacher_width, BT, BV, BK)
    token = first_token + tl.arange(0, BT)
    # Halves one after the other, as in ``dz_kernel``.
    z_left, z_right = halves(z, BT, BV)
    w_left, w_right = halves(w, BT, BV)
    left = entry_gradient(
        z_left, w_left, scalars, stride, token, tokens, scale,
        teacher_term, student_term, log_teacher, log_student, clip,
    )  # fmt: skip
    dz.store([first_token, first_column], rounded(left, dz.dtype))
    right = entry_gradient(
        z_right, w_right, scalars, stride, token, tokens, scale,
        teacher_term, student_term, log_teacher, log_student, clip,
    )  # fmt: skip
    dz.store([first_token, first_column + BV // 2], rounded(right, dz.dtype))
