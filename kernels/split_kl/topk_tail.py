"""Divergences on the teacher's top-k tokens and one bucket for all others, without the teacher's logits.

With p the student and q the teacher, S the teacher's top-k, P' = 1 - sum_S p and Q' = 1 - sum_S q the masses
of the tail, both softmaxes over the whole vocabulary:

    FKL' = sum_S q ln(q/p) + Q' ln(Q'/P')       dz = p - q on S,              p (1 - Q'/P') off S
    RKL' = sum_S p ln(p/q) + P' ln(P'/Q')       dz = p (ln(p/q) - RKL') on S, p (ln(P'/Q') - RKL') off S

Both are lower bounds of the full divergences (data processing inequality) and reach them as k grows. They save
the teacher's GEMM in pass 2, a third to a half of its FLOPs, and a teacher elsewhere sends k ids and
log-probabilities per token instead of a hidden state. Renormalising on S instead would leave no gradient at
all on the tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .entropy_state import EntropyStats
from .support import SupportGradient
from .topk import NO_ID


class TopKTarget(NamedTuple):
    """The teacher's K most likely tokens and how much is left: what of a teacher a top-k divergence needs.

    Attributes:
        ids: int64 [T, K]. logprobs: [T, K], normalised over the whole vocabulary.
        tail_mass: [T], the mass of all other tokens. 1 - sum(exp(logprobs)) only where nothing better is known.
    """

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor

    @classmethod
    def of(cls, teacher: EntropyStats) -> TopKTarget:
        """From ``linear_entropy(..., topk=K)``, merged over ranks and finalised.

        Raises:
            ValueError: the statistics were computed without a top-k.
        """
        if teacher.topk_ids is None or teacher.topk_logprobs is None or teacher.tail_mass is None:
            raise ValueError(
                "teacher has no top-k, wanted statistics of linear_entropy(..., topk=K) with K >= 1"
            )
        return cls(teacher.topk_ids, teacher.topk_logprobs, teacher.tail_mass)


class TailStats(NamedTuple):
    """Divergences with a tail bucket, nats, and what their gradients need; fields [T].

    In float32 a tail mass is exact to about 1e-7 and is bounded from below by the dtype's epsilon, 1.2e-7: less is
    rounding, and its logarithm arbitrary. The divergences therefore carry errors of about 1e-7 times the ratio of the
    tails, reverse: student_tail / teacher_tail, forward: teacher_tail / student_tail, and their gradients on the
    tail are bounded where one is floored. (On ``triton`` 1e-5 instead of 1e-7: gathered logits and those behind
    the log-sum-exp are summed in different orders there.)
    """

    student_lse: Tensor
    student_entropy: Tensor
    student_logprob: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    student_tail: Tensor
    teacher_tail: Tensor


def topk_tail_stats(student: EntropyStats, target: TopKTarget) -> TailStats:
    """Both divergences; ``student`` from ``linear_entropy(..., gather_ids=target.ids)``, merged over ranks.

    Raises:
        ValueError: ``student`` has no gathered log-probabilities, or not of the target's shape.
    """
    log_p, log_q = _supports(student, target)
    assert student.support_tail_mass is not None
    epsilon = torch.finfo(log_p.dtype).eps
    student_tail = student.support_tail_mass.clamp(min=epsilon)
    teacher_tail = target.tail_mass.to(log_p.dtype).clamp(min=epsilon)
    log_ratio = log_q - log_p
    tail_ratio = teacher_tail.log() - student_tail.log()
    return TailStats(
        student.lse,
        student.entropy,
        student.logprob,
        forward_kl=(log_q.exp() * log_ratio).sum(1) + teacher_tail * tail_ratio,
        reverse_kl=-(log_p.exp() * log_ratio).sum(1) - student_tail * tail_ratio,
        student_tail=student_tail,
        teacher_tail=teacher_tail,
    )


def topk_tail_gradient(
    student: EntropyStats, target: TopKTarget, stats: TailStats, labels: Tensor, coefficients: Tensor
) -> SupportGradient:
    """Of sum_t (c_0 FKL'_t + c_1 RKL'_t + c_2 H_s,t + c_3 ln p_t(y_t)), for ``linear_support_grads``.

    Args:
        labels: int64 [T]. coefficients: [T, 4], columns ``checks.COEFFICIENTS``.
    """
    log_p, log_q = _supports(student, target)
    forward, reverse, entropy, logprob = coefficients.to(log_p.dtype).unbind(1)
    tail_ratio = stats.teacher_tail.log() - stats.student_tail.log()
    # Of every entry: -c_e p (ln p + H) - c_y p, and the reverse divergence's -c_r p RKL'.
    common = -reverse * stats.reverse_kl - entropy * stats.student_entropy - logprob
    offset = common + forward * (1 - tail_ratio.exp()) - reverse * tail_ratio
    p = log_p.exp()
    values = forward[:, None] * (p - log_q.exp())
    values += p * (common[:, None] + reverse[:, None] * (log_p - log_q) - entropy[:, None] * log_p)
    # The sampled token is one more entry, unless S holds it.
    sampled = target.ids == labels[:, None]
    values += sampled * logprob[:, None]
    own = stats.student_logprob.exp() * (offset - entropy * stats.student_logprob) + logprob
    own_id = torch.where(sampled.any(1), NO_ID, labels)
    return SupportGradient(
        lse=stats.student_lse,
        offset=offset,
        slope=-entropy,
        ids=torch.cat([target.ids, own_id[:, None]], dim=1),
        values=torch.cat([values, own[:, None]], dim=1),
    )


def _supports(student: EntropyStats, target: TopKTarget) -> tuple[Tensor, Tensor]:
    log_p = student.support_logprobs
    if log_p is None or log_p.shape != target.ids.shape or target.logprobs.shape != target.ids.shape:
        got = None if log_p is None else tuple(log_p.shape)
        raise ValueError(
            f"student.support_logprobs has shape {got} and target.logprobs {tuple(target.logprobs.shape)}, wanted "
            f"{tuple(target.ids.shape)} like target.ids: pass gather_ids=target.ids to linear_entropy"
        )
    return log_p, target.logprobs.to(log_p.dtype)
