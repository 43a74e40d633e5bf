"""Columns that compare what both models think likely: top-k lists, and how far their probabilities are apart."""

from __future__ import annotations

import torch
from sead_kernels.split_kl import (
    PointwiseRule,
    TokenStats,
    linear_pointwise_stats,
    sum_tp,
    support_mass,
    teachability_margin,
    topk_overlap,
)
from torch import Tensor

from sead_megatron.training.token_loss import LossContext, one_model_statistics, present

TOPK_COLUMNS = (
    "topk_overlap",
    "topk_student_mass",
    "topk_teacher_mass",
    "topk_margin",
    "gap_head",
    "gap_tail",
)
"""Columns of the TokenTable."""

ARGMAX_COLUMNS = ("argmax_student_logprob", "argmax_teacher_logprob")
"""Columns of the TokenTable."""

# Of the teacher's probability: AKL's head is the smallest set of tokens that holds it.
_HEAD_MASS = 0.5


@torch.no_grad()
def topk_columns(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    stats: TokenStats,
    topk: int,
    context: LossContext,
) -> dict[str, Tensor]:
    """`TOPK_COLUMNS` of every row, float32 [R], equal on all tensor-parallel ranks.

    Args:
        hidden, teacher_hidden: [R, H_s] and [R, H_t]. weight, teacher_weight: this rank's vocabulary shard.
        stats: of the same rows over the whole vocabulary.
        topk: k >= 2. Where the teacher's k likeliest tokens hold less than half of its probability, they are the head.

    Costs five passes over an output layer beside the two of `stats`.
    """
    student = one_model_statistics(hidden, weight, topk, None, context)
    student_ids = present(student.topk_ids)
    teacher = one_model_statistics(teacher_hidden, teacher_weight, topk, student_ids, context)
    teacher_ids = present(teacher.topk_ids)
    on_teacher_list = one_model_statistics(hidden, weight, 0, teacher_ids, context)
    log_p = present(on_teacher_list.support_logprobs)
    log_q = present(teacher.topk_logprobs)
    q = log_q.exp()
    head = q.cumsum(1) - q < _HEAD_MASS
    gap_head = ((log_p.exp() - q).abs() * head).sum(1)
    gap = _gap(hidden, weight, teacher_hidden, teacher_weight, stats, context)
    columns = {
        "topk_overlap": topk_overlap(student_ids, teacher_ids),
        "topk_student_mass": support_mass(teacher_ids, log_p),
        "topk_teacher_mass": support_mass(student_ids, present(teacher.support_logprobs)),
        "topk_margin": teachability_margin(present(student.topk_logprobs), present(teacher.support_logprobs)),
        "gap_head": gap_head,
        "gap_tail": (gap - gap_head).clamp_min(0),
    }
    return {name: columns[name].float() for name in TOPK_COLUMNS}


@torch.no_grad()
def argmax_columns(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, context: LossContext
) -> dict[str, Tensor]:
    """`ARGMAX_COLUMNS` of every row, float32 [R], equal on all tensor-parallel ranks; a pass over each output layer.

    The arguments are those of `topk_columns`.
    """
    teacher = one_model_statistics(teacher_hidden, teacher_weight, 1, None, context)
    student = one_model_statistics(hidden, weight, 0, present(teacher.topk_ids), context)
    values = (present(student.support_logprobs), present(teacher.topk_logprobs))
    return {name: value[:, 0].float() for name, value in zip(ARGMAX_COLUMNS, values, strict=True)}


def _gap(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    stats: TokenStats,
    context: LossContext,
) -> Tensor:
    """``sum_v |p_v - q_v|`` [R]: the last row of any pointwise statistics."""
    sums = linear_pointwise_stats(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        stats,
        PointwiseRule("forward"),
        shard=context.shard,
        temperature=context.temperature,
        options=context.options,
    )
    return (sum_tp(sums, context.tp_group) if len(hidden) else sums)[-1]
