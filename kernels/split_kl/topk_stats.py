"""Value and gradient of a top-k loss: the divergences of a rule, the student's entropy and the sampled token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import COEFFICIENTS
from .entropy_state import EntropyStats
from .support import SupportGradient
from .topk import NO_ID
from .topk_rules import Support, resolve_rule
from .topk_target import TopKTarget


class TopKStats(NamedTuple):
    """Statistics of a top-k loss, nats, fields [T]; a divergence that the rule does not define is None.

    ``student_tail`` and ``teacher_tail`` are the masses off the support. In float32 they are exact to about 1e-7 and
    bounded from below by the dtype's epsilon, 1.2e-7: less is rounding, and its logarithm arbitrary. The divergences of
    rule ``tail`` therefore carry errors of about 1e-7 times the ratio of the tails, reverse: student_tail /
    teacher_tail, forward: teacher_tail / student_tail; their gradients on the tail are bounded where one is floored.
    (On ``triton`` 1e-5 instead of 1e-7: gathered logits and those behind the log-sum-exp are summed in different
    orders there.)
    """

    student_lse: Tensor
    student_entropy: Tensor
    student_logprob: Tensor
    student_tail: Tensor
    teacher_tail: Tensor
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None


def topk_stats_and_gradient(
    student: EntropyStats, target: TopKTarget, labels: Tensor, coefficients: Tensor, rule: str
) -> tuple[TopKStats, SupportGradient]:
    """The statistics, and of sum_t (c_0 FKL_t + c_1 RKL_t + c_2 H_s,t + c_3 ln p_t(y_t)) the gradient.

    Args:
        student: from ``linear_entropy(..., gather_ids=target.ids)``, merged over ranks, then
            ``finalize_entropy(..., gather_ids=target.ids)``.
        labels: int64 [T]. coefficients: [T, 4], columns ``COEFFICIENTS``; of a divergence that the rule does not
            define they are not read.
        rule: a key of ``topk_rules.RULES``.

    Raises:
        ValueError: ``student`` has no gathered log-probabilities, or not of the target's shape; no such rule.
    """
    support = _support(student, target)
    log_p, p = support.log_p, support.log_p.exp()
    weights = dict(zip(COEFFICIENTS, coefficients.to(log_p.dtype).unbind(1), strict=True))
    entropy, logprob = weights["entropy"], weights["logprob"]
    # -c_e p (ln p + H) - c_y p of every entry, c_y more of the sampled one; then the divergences.
    offset = -entropy * student.entropy - logprob
    values = offset[:, None] * p - entropy[:, None] * (p * log_p)
    chosen = resolve_rule(rule)
    divergences = dict(zip(chosen.divergences, chosen.of(support), strict=True))
    for name, divergence in divergences.items():
        offset = offset + weights[name] * divergence.offset
        values += weights[name][:, None] * divergence.values
    # The sampled token is one more entry, unless S holds it.
    sampled = target.ids == labels[:, None]
    values += sampled * logprob[:, None]
    own = student.logprob.exp() * (offset - entropy * student.logprob) + logprob
    own_id = torch.where(sampled.any(1), NO_ID, labels)
    gradient = SupportGradient(
        lse=student.lse,
        offset=offset,
        slope=-entropy,
        ids=torch.cat([target.ids, own_id[:, None]], dim=1),
        values=torch.cat([values, own[:, None]], dim=1),
    )
    stats = TopKStats(
        student.lse,
        student.entropy,
        student.logprob,
        support.student_tail,
        support.teacher_tail,
        **{name: divergence.value for name, divergence in divergences.items()},
    )
    return stats, gradient


def _support(student: EntropyStats, target: TopKTarget) -> Support:
    log_p = student.support_logprobs
    if log_p is None or log_p.shape != target.ids.shape or target.logprobs.shape != target.ids.shape:
        got = None if log_p is None else tuple(log_p.shape)
        raise ValueError(
            f"student.support_logprobs has shape {got} and target.logprobs {tuple(target.logprobs.shape)}, wanted "
            f"{tuple(target.ids.shape)} like target.ids: pass gather_ids=target.ids to linear_entropy"
        )
    assert student.support_tail_mass is not None
    return Support.of(target.ids, log_p, target.logprobs, student.support_tail_mass, target.tail_mass)
