"""The split-KL loss as one autograd node: pass 1 and the value in forward, pass 2 in backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .api import linear_split_kl_grads, linear_stats
from .checks import (
    active_rows,
    check_coefficients,
    check_model,
    check_pair,
    check_rows,
    check_whole_vocabulary,
)
from .logit_cache import LogitCache
from .state import TokenStats, finalize
from .tensor_parallel import merge_tp
from .tiling import DEFAULT_TILES, TileOptions, VocabShard
from .topk_stats import TopKStats
from .weight_protocol import input_gradients, select_rows


class SplitKLOutput(NamedTuple):
    """``loss`` scalar with gradient; ``stats`` of the active rows only; ``active`` their int64 indices."""

    loss: Tensor
    stats: TokenStats
    active: Tensor


@dataclass(frozen=True)
class LossSettings:
    """Everything of a loss call that is not a tensor."""

    shard: VocabShard
    tp_group: dist.ProcessGroup | None
    temperature: float
    options: TileOptions
    weight_tied: bool


def split_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    shard: VocabShard,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_tied: bool = False,
    active: Tensor | None = None,
) -> SplitKLOutput:
    """sum_t (c_0 KL(q||p)_t + c_1 KL(p||q)_t + c_2 H(p)_t + c_3 ln p_t(y_t)), p the student and q the
    teacher.

    All terms are of the softmaxes at ``temperature``; there is no factor temperature^2. Rows whose four
    coefficients are 0 are dropped before any GEMM. The backward pass recomputes the logits tile by tile.

    Args:
        student_hidden: [T, Hs]. Its gradient is PARTIAL over tensor parallelism: wrap it in Megatron's
            ``copy_to_tensor_model_parallel_region`` or ``gather_from_sequence_parallel_region``, which
            reduce.
        student_weight: [Vl, Hs] output-layer shard. With a ``main_grad`` (Megatron DDP) the gradient is added
            to it tile by tile and the hook gets the dummy that Megatron's own linear layers return.
        teacher_hidden: [T, Ht]. teacher_weight: [Vl, Ht], the same vocabulary ids. Constants.
        labels: [T] int64 global ids; checked on active rows only, so masked positions may hold anything.
        coefficients: [T, 4] float32, columns ``COEFFICIENTS``, constants. Identical on all tensor-parallel
            ranks: they decide the active rows, hence the shape of the all_gather.
        tp_group: the ranks whose shards make up the vocabulary; None for one rank.
        weight_tied: the weight is also the input embedding in this same autograd graph. With a ``main_grad``
            the returned gradient is then None, and the embedding's own gradient fires the hook. A dummy would
            mark the parameter as done and Megatron would drop the embedding's part.
        active: int64 indices of the rows with a coefficient that is not 0, ascending, where the caller knows them: to
            look for them waits for the device. Other rows are dropped, whatever their coefficients.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    tokens = student_hidden.shape[0]
    check_coefficients(coefficients, student_hidden)
    # Before rows are selected, so that what is wrong does not depend on which are active.
    check_model("student", student_hidden, student_weight)
    check_model("teacher", teacher_hidden, teacher_weight)
    check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    check_whole_vocabulary(student_weight, shard, 1 if tp_group is None else tp_group.size())
    if not torch.is_grad_enabled():
        options = replace(options, cache_mib=0)
    check_rows(tokens, labels=labels)
    settings = LossSettings(shard, tp_group, temperature, options, weight_tied)
    rows = active_rows(active, coefficients)
    loss, stats = _SplitKL.apply(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, coefficients, rows, settings
    )
    return SplitKLOutput(loss, TokenStats(*stats.unbind(0)), rows)


def weighted_sum(stats: TokenStats | TopKStats, coefficients: Tensor) -> Tensor:
    """The loss: the four terms of ``COEFFICIENTS`` times ``coefficients`` [T, 4], summed; a missing term is 0."""
    terms = [stats.forward_kl, stats.reverse_kl, stats.student_entropy, stats.student_logprob]
    absent = torch.zeros_like(stats.student_lse)
    return (coefficients * torch.stack([absent if t is None else t for t in terms], dim=1)).sum()


class _SplitKL(torch.autograd.Function):
    """Keeps references to its inputs, the active indices, eight numbers per active row, and the logit cache."""

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
        settings: LossSettings,
    ) -> tuple[Tensor, Tensor]:
        cache = LogitCache(settings.options.cache_mib) if settings.options.cache_mib else None
        state = linear_stats(
            select_rows(student_hidden, active),
            student_weight,
            select_rows(teacher_hidden, active),
            teacher_weight,
            select_rows(labels, active),
            shard=settings.shard,
            temperature=settings.temperature,
            options=settings.options,
            cache=cache,
        )
        # Without a row nothing is communicated, on no rank: all of them see the same coefficients.
        stats = finalize(merge_tp(state, settings.tp_group) if active.numel() else state)
        loss = weighted_sum(stats, select_rows(coefficients, active))
        packed = torch.stack(stats)
        ctx.save_for_backward(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            coefficients,
            active,
            packed,
        )
        # The parameter itself: a saved tensor may come back as another object, without main_grad.
        ctx.weight = student_weight
        ctx.settings = settings
        ctx.cache = cache
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, labels, coefficients, active, packed = (
            ctx.saved_tensors
        )
        settings: LossSettings = ctx.settings

        def pass2(weight_grad: Tensor | None, weight_requires_grad: bool) -> tuple[Tensor, Tensor | None]:
            return linear_split_kl_grads(
                select_rows(hidden, active),
                weight,
                select_rows(teacher_hidden, active),
                teacher_weight,
                select_rows(labels, active),
                TokenStats(*packed.unbind(0)),
                select_rows(coefficients, active) * grad_loss,
                shard=settings.shard,
                temperature=settings.temperature,
                options=settings.options,
                weight_grad=weight_grad,
                weight_requires_grad=weight_requires_grad,
                cache=ctx.cache,
            )

        return *input_gradients(ctx, hidden, active, pass2), *(None,) * 6
