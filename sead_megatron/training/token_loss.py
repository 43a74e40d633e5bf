"""The loss of a microbatch's response tokens: which kernel computes what an objective asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from sead_kernels.split_kl import (
    NO_ID,
    EntropyStats,
    PointwiseRule,
    TileOptions,
    TopKTarget,
    VocabShard,
    finalize_entropy,
    linear_entropy,
    merge_tp,
    pointwise_loss,
    split_kl_loss,
    topk_loss,
)
from torch import Tensor

from sead_megatron.data.terms import Divergence, Pointwise, Term, TopK
from sead_megatron.training.device_rows import ActiveRows

_Value = TypeVar("_Value")

# TokenTable columns that a pass through both output layers measures, and the kernel's names of them.
MEASURED = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "student_logprob",
    "teacher_logprob",
)


# Those of them that need no teacher.
OF_STUDENT = ("student_entropy", "student_logprob")


def measured_by(
    divergence: Divergence | None, *, has_teacher: bool, teacher_argmax: bool = False
) -> tuple[str, ...]:
    """The columns that the loss itself measures on active tokens: a top-k loss makes no pass over the teacher, and one
    on the teacher's likeliest tokens sees no sampled one."""
    columns = OF_STUDENT if isinstance(divergence, TopK) or not has_teacher else MEASURED
    return tuple(name for name in columns if not (teacher_argmax and name.endswith("_logprob")))


@dataclass(frozen=True)
class LossContext:
    """What is the same for all microbatches of a run. `tied`: the weight is the input embedding too."""

    shard: VocabShard
    tp_group: dist.ProcessGroup | None
    temperature: float
    options: TileOptions
    tied: bool = False


class TokenLoss(NamedTuple):
    """`loss` with gradient; columns of `measured_by`, of the active rows."""

    loss: Tensor
    columns: dict[str, Tensor]


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    weights: Tensor,
    active: ActiveRows,
    divergence: Divergence | None,
    context: LossContext,
    *,
    teacher_argmax: bool = False,
) -> TokenLoss:
    """``sum_t weights_t . (forward, reverse, H_student, log q(y))``, forward and reverse as `divergence` says.

    Args:
        hidden: [R, H_s] with gradient, labels: int64 [R], weights: float32 [R, 4].
        weight: output layer of this rank's vocabulary shard.
        active: which of the rows have weights.
        teacher: its hidden states [R, H_t] and output layer; None without one, and then no divergence has a weight.
        divergence: None for the KL divergences over the whole vocabulary.
        teacher_argmax: y is the teacher's likeliest token, whatever `labels` says.
    """
    shared = {
        "shard": context.shard,
        "tp_group": context.tp_group,
        "temperature": context.temperature,
        "options": context.options,
        "weight_tied": context.tied,
        "active": active.loss,
    }
    if teacher_argmax and teacher is not None:
        labels = _teacher_argmax(*teacher, labels, active.loss, context)
    if teacher is None:
        result = topk_loss(hidden, weight, _no_target(hidden), labels, weights, rule="tail", **shared)
    elif isinstance(divergence, TopK):
        target = _target(hidden.detach(), weight, *teacher, active.divergence, divergence, context)
        result = topk_loss(hidden, weight, target, labels, weights, rule=divergence.rule, **shared)
    elif isinstance(divergence, Pointwise):
        rule = PointwiseRule(divergence.kind, divergence.share, divergence.clip)
        forward = weights[:, Term.FORWARD_KL]
        result = pointwise_loss(hidden, weight, *teacher, labels, forward, rule, **shared)
    else:
        result = split_kl_loss(hidden, weight, *teacher, labels, weights, **shared)
    columns = {
        name: getattr(result.stats, name)
        for name in measured_by(divergence, has_teacher=teacher is not None, teacher_argmax=teacher_argmax)
    }
    return TokenLoss(result.loss, columns)


def _no_target(hidden: Tensor) -> TopKTarget:
    """Empty slots for every token: what is left of a top-k loss are entropy and log-probability."""
    ids = torch.full((len(hidden), 1), NO_ID, dtype=torch.int64, device=hidden.device)
    nothing = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
    return TopKTarget(ids, nothing, nothing[:, 0] + 1)


@torch.no_grad()
def _teacher_argmax(
    teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, active: Tensor, context: LossContext
) -> Tensor:
    """`labels` with the teacher's likeliest token on every active row, int64 [R]."""
    teacher = one_model_statistics(teacher_hidden[active], teacher_weight, 1, None, context)
    return labels.index_copy(0, active, present(teacher.topk_ids)[:, 0])


@torch.no_grad()
def _target(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    divergence: TopK,
    context: LossContext,
) -> TopKTarget:
    """Support and teacher of `tokens`, those that have a divergence; empty slots for all others.

    The teacher's output layer runs on those tokens only.
    """
    student_ids = None
    if divergence.support != "teacher":
        student = one_model_statistics(hidden[tokens], weight, divergence.k, None, context)
        student_ids = student.topk_ids
    teacher = one_model_statistics(teacher_hidden[tokens], teacher_weight, divergence.k, student_ids, context)
    found = TopKTarget.of(teacher, divergence.support, student_ids)
    width = found.ids.shape[1]
    ids = torch.full((len(hidden), width), NO_ID, dtype=torch.int64, device=hidden.device)
    logprobs = found.logprobs.new_zeros(len(hidden), width)
    tail_mass = found.tail_mass.new_ones(len(hidden))
    ids[tokens], logprobs[tokens], tail_mass[tokens] = found.ids, found.logprobs, found.tail_mass
    return TopKTarget(ids, logprobs, tail_mass)


def one_model_statistics(
    hidden: Tensor,
    weight: Tensor,
    topk: int,
    gather_ids: Tensor | None,
    context: LossContext,
    labels: Tensor | None = None,
) -> EntropyStats:
    """Entropy, logprob of `labels` int64 [T], top-k list and gathered log-probabilities of one model, over the whole
    vocabulary, equal on all TP ranks."""
    if labels is None:
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    state = linear_entropy(
        hidden,
        weight,
        labels,
        shard=context.shard,
        temperature=context.temperature,
        topk=topk,
        gather_ids=gather_ids,
        options=context.options,
    )
    # Without a token nothing is communicated, on no rank: all of them see the same weights.
    merged = merge_tp(state, context.tp_group) if len(hidden) else state
    return finalize_entropy(merged, context.shard.valid, gather_ids=gather_ids)


def present(value: _Value | None) -> _Value:
    """What was asked for before. Raises RuntimeError where it is not there."""
    if value is None:
        raise RuntimeError("something that was asked for before is missing")
    return value
