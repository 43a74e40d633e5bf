"""The loss on a pointwise divergence as one autograd node: both sweeps of statistics in forward, pass 2 in backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .api import linear_pointwise_grads, linear_pointwise_stats, linear_stats
from .checks import (
    active_rows,
    check_coefficients,
    check_model,
    check_pair,
    check_rows,
    check_whole_vocabulary,
)
from .logit_cache import LogitCache
from .loss import LossSettings
from .pointwise import PointwiseRule
from .state import TokenStats, finalize
from .tensor_parallel import merge_tp, sum_tp
from .tiling import DEFAULT_TILES, TileOptions, VocabShard
from .weight_protocol import input_gradients, select_rows


class PointwiseStats(NamedTuple):
    """``TokenStats``, then the divergence itself and sum_v |p_v - q_v|; every field [T]."""

    student_lse: Tensor
    teacher_lse: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    divergence: Tensor
    gap: Tensor


class PointwiseOutput(NamedTuple):
    """``loss`` scalar with gradient; ``stats`` of the active rows only; ``active`` their int64 indices."""

    loss: Tensor
    stats: PointwiseStats
    active: Tensor


def pointwise_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    rule: PointwiseRule,
    *,
    shard: VocabShard,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_tied: bool = False,
    active: Tensor | None = None,
) -> PointwiseOutput:
    """sum_t coefficients_t D_t, D the divergence of ``rule``; everything else as :func:`loss.split_kl_loss`.

    Args:
        coefficients: [T] float32, constants, identical on all tensor-parallel ranks. Rows of 0 are dropped before
            any GEMM.
        student_hidden ... active: as there.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    check_coefficients(coefficients, student_hidden, None)
    # Before rows are selected, so that what is wrong does not depend on which are active.
    check_model("student", student_hidden, student_weight)
    check_model("teacher", teacher_hidden, teacher_weight)
    check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    check_whole_vocabulary(student_weight, shard, 1 if tp_group is None else tp_group.size())
    check_rows(student_hidden.shape[0], labels=labels)
    settings = LossSettings(shard, tp_group, temperature, options, weight_tied)
    rows = active_rows(active, coefficients)
    loss, stats = _Pointwise.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        coefficients,
        rows,
        rule,
        settings,
    )
    return PointwiseOutput(loss, PointwiseStats(*stats.unbind(0)), rows)


class _Pointwise(torch.autograd.Function):
    """Keeps references to its inputs, the active indices, nine numbers per active row, and the logit cache."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        coefficients: Tensor,
        active: Tensor,
        rule: PointwiseRule,
        settings: LossSettings,
    ) -> tuple[Tensor, Tensor]:
        # Of use without a backward pass too: the logits are wanted twice in here.
        cache = LogitCache(settings.options.cache_mib) if settings.options.cache_mib else None
        pair = (
            select_rows(student_hidden, active),
            student_weight,
            select_rows(teacher_hidden, active),
            teacher_weight,
        )
        shared: dict[str, Any] = {
            "shard": settings.shard,
            "temperature": settings.temperature,
            "options": settings.options,
            "cache": cache,
        }
        # Without a row nothing is communicated, on no rank: all of them see the same coefficients.
        group = settings.tp_group if active.numel() else None
        stats = finalize(merge_tp(linear_stats(*pair, select_rows(labels, active), **shared), group))
        sums = sum_tp(linear_pointwise_stats(*pair, stats, rule, **shared), group)
        divergence, moment, mass, gap = sums
        loss = (select_rows(coefficients, active) * divergence).sum()
        ctx.save_for_backward(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            coefficients,
            active,
            moment / mass,
            *stats,
        )
        # The parameter itself: a saved tensor may come back as another object, without main_grad.
        ctx.weight = student_weight
        ctx.settings = settings
        ctx.rule = rule
        ctx.cache = cache
        packed = torch.stack([*stats, divergence, gap])
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, coefficients, active, mean, *stats = ctx.saved_tensors
        settings: LossSettings = ctx.settings

        def pass2(weight_grad: Tensor | None, weight_requires_grad: bool) -> tuple[Tensor, Tensor | None]:
            return linear_pointwise_grads(
                select_rows(hidden, active),
                weight,
                select_rows(teacher_hidden, active),
                teacher_weight,
                TokenStats(*stats),
                mean,
                select_rows(coefficients, active) * grad_loss,
                ctx.rule,
                shard=settings.shard,
                temperature=settings.temperature,
                options=settings.options,
                weight_grad=weight_grad,
                weight_requires_grad=weight_requires_grad,
                cache=ctx.cache,
            )

        return *input_gradients(ctx, hidden, active, pass2), *(None,) * 7
