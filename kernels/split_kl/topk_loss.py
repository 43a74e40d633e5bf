"""A loss on a few vocabulary entries per token as one autograd node; needs no teacher logits.

Against the exact loss it saves the teacher's GEMM in pass 2, a third to a half of its FLOPs, and a teacher elsewhere
sends K ids and log-probabilities per token instead of a hidden state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .api import linear_entropy, linear_support_grads
from .checks import (
    active_rows,
    check_coefficients,
    check_model,
    check_rows,
    check_target_ids,
    check_whole_vocabulary,
)
from .entropy_state import finalize_entropy
from .loss import LossSettings, weighted_sum
from .support import SupportGradient
from .tensor_parallel import merge_tp
from .tiling import DEFAULT_TILES, TileOptions, VocabShard
from .topk_rules import check_rule_coefficients, resolve_rule
from .topk_stats import TopKStats, topk_stats_and_gradient
from .topk_target import TopKTarget
from .weight_protocol import input_gradients, select_rows


class TopKOutput(NamedTuple):
    """``loss`` scalar with gradient; ``stats`` of the active rows only; ``active`` their int64 indices."""

    loss: Tensor
    stats: TopKStats
    active: Tensor


def topk_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: TopKTarget,
    labels: Tensor,
    coefficients: Tensor,
    *,
    rule: str,
    shard: VocabShard,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_tied: bool = False,
    active: Tensor | None = None,
) -> TopKOutput:
    """As :func:`loss.split_kl_loss` with the divergences of a rule in place of the exact ones.

    Args:
        target: of the same tokens and temperature, [T, K], identical on all tensor-parallel ranks; the ids of
            active rows distinct and in the vocabulary, or ``topk.NO_ID``.
        coefficients: a divergence that the rule does not define has coefficients 0. EOPD (arXiv 2603.07079) is rule
            ``forward_teacher_norm`` with -A in column ``logprob`` of every token and alpha in column ``forward_kl``
            of the gated ones.
        rule: a key of ``topk_rules.RULES``, where the formulas are.
        student_hidden ... active: as there.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    tokens = student_hidden.shape[0]
    divergences = resolve_rule(rule).divergences
    check_coefficients(coefficients, student_hidden)
    if options.check_values:
        check_rule_coefficients(rule, coefficients)
    check_model("student", student_hidden, student_weight)
    check_whole_vocabulary(student_weight, shard, 1 if tp_group is None else tp_group.size())
    columns = {
        "target.ids": target.ids,
        "target.logprobs": target.logprobs,
        "target.tail_mass": target.tail_mass,
        "labels": labels,
    }
    check_rows(tokens, **columns)
    settings = LossSettings(shard, tp_group, temperature, options, weight_tied)
    rows = active_rows(active, coefficients)
    loss, packed = _TopK.apply(
        student_hidden, student_weight, *target, labels, coefficients, rows, rule, settings
    )
    fields = (*TopKStats._fields[:-2], *divergences)
    return TopKOutput(loss, TopKStats(**dict(zip(fields, packed.unbind(0), strict=True))), rows)


class _TopK(torch.autograd.Function):
    """Keeps references to its inputs, the active indices and 2 K + 5 numbers per active row."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        target_ids: Tensor,
        target_logprobs: Tensor,
        target_tail_mass: Tensor,
        labels: Tensor,
        coefficients: Tensor,
        active: Tensor,
        rule: str,
        settings: LossSettings,
    ) -> tuple[Tensor, Tensor]:
        whole = TopKTarget(target_ids, target_logprobs, target_tail_mass)
        target = TopKTarget(*(select_rows(column, active) for column in whole))
        if settings.options.check_values:
            check_target_ids(target.ids, settings.shard)
        labels, coefficients = select_rows(labels, active), select_rows(coefficients, active)
        state = linear_entropy(
            select_rows(student_hidden, active),
            student_weight,
            labels,
            shard=settings.shard,
            temperature=settings.temperature,
            gather_ids=target.ids,
            options=settings.options,
        )
        # Without a row nothing is communicated, on no rank: all of them see the same coefficients.
        merged = merge_tp(state, settings.tp_group) if active.numel() else state
        student = finalize_entropy(merged, settings.shard.valid, target.ids)
        stats, gradient = topk_stats_and_gradient(student, target, labels, coefficients, rule)
        loss = weighted_sum(stats, coefficients)
        packed = torch.stack([value for value in stats if value is not None])
        ctx.save_for_backward(
            student_hidden,
            student_weight,
            active,
            gradient.lse,
            gradient.offset,
            gradient.slope,
            gradient.ids,
            gradient.values,
        )
        # The parameter itself: a saved tensor may come back as another object, without main_grad.
        ctx.weight = student_weight
        ctx.settings = settings
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, active, *fields = ctx.saved_tensors
        settings: LossSettings = ctx.settings
        gradient = SupportGradient(*fields).times(grad_loss)

        def pass2(weight_grad: Tensor | None, weight_requires_grad: bool) -> tuple[Tensor, Tensor | None]:
            return linear_support_grads(
                select_rows(hidden, active),
                weight,
                gradient,
                shard=settings.shard,
                temperature=settings.temperature,
                options=settings.options,
                weight_grad=weight_grad,
                weight_requires_grad=weight_requires_grad,
            )

        return *input_gradients(ctx, hidden, active, pass2), *(None,) * 8
