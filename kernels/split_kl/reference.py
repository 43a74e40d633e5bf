"""Dense float64 oracle of everything in this package. Materialises [T, V]; for tests only.

Weights are those of the whole vocabulary, with the padding rows, if any, at the end. ``dense_loss`` is built
from ``log_softmax`` alone, for torch autograd; ``dense_stats`` and ``dense_gradients`` are the closed
formulas. A pointwise divergence is its published definition, for autograd too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pointwise import PointwiseRule
from .state import TokenStats
from .topk import NO_ID


def _logits(hidden: Tensor, weight: Tensor, valid: int, temperature: float) -> Tensor:
    return hidden.double() @ weight[:valid].double().t() / temperature


def dense_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    valid: int,
    temperature: float = 1.0,
) -> TokenStats:
    """Every statistic of each token, [T] float64."""
    student = _logits(student_hidden, student_weight, valid, temperature)
    teacher = _logits(teacher_hidden, teacher_weight, valid, temperature)
    student_lse, teacher_lse = student.logsumexp(-1), teacher.logsumexp(-1)
    log_p, log_q = student - student_lse[:, None], teacher - teacher_lse[:, None]
    p, q = log_p.exp(), log_q.exp()
    return TokenStats(
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        student_entropy=-(p * log_p).sum(-1),
        teacher_entropy=-(q * log_q).sum(-1),
        forward_kl=(q * (log_q - log_p)).sum(-1),
        reverse_kl=(p * (log_p - log_q)).sum(-1),
        student_logprob=log_p.gather(1, labels[:, None])[:, 0],
        teacher_logprob=log_q.gather(1, labels[:, None])[:, 0],
    )


def dense_gradients(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    valid: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(dh [T, Hs], dW [V, Hs]) float64 of ``dense_loss`` by the closed formulas, padding rows of dW zero."""
    log_p = _logits(student_hidden, student_weight, valid, temperature).log_softmax(-1)
    log_q = _logits(teacher_hidden, teacher_weight, valid, temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    reverse_kl = (p * (log_p - log_q)).sum(-1, keepdim=True)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    sampled = torch.zeros_like(p).scatter_(1, labels[:, None], 1.0)
    c_forward, c_reverse, c_entropy, c_logprob = coefficients.double()[:, :, None].unbind(1)
    dz = (
        c_forward * (p - q)
        + c_reverse * p * (log_p - log_q - reverse_kl)
        - c_entropy * p * (log_p + entropy)
        + c_logprob * (sampled - p)
    ) / temperature
    weight_gradient = torch.zeros(student_weight.shape, dtype=torch.float64)
    weight_gradient[:valid] = dz.t() @ student_hidden.double()
    return dz @ student_weight[:valid].double(), weight_gradient


def dense_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    valid: int,
    temperature: float = 1.0,
) -> Tensor:
    """The loss as a scalar that torch autograd differentiates; the coefficients are constants."""
    log_p = _logits(student_hidden, student_weight, valid, temperature).log_softmax(-1)
    log_q = _logits(teacher_hidden, teacher_weight, valid, temperature).log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    terms = torch.stack(
        [
            (q * (log_q - log_p)).sum(-1),
            (p * (log_p - log_q)).sum(-1),
            -(p * log_p).sum(-1),
            log_p.gather(1, labels[:, None])[:, 0],
        ],
        dim=1,
    )
    return (coefficients.double() * terms).sum()


def dense_topk_entropy(
    hidden: Tensor, weight: Tensor, topk: int, *, valid: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(entropy of the K most likely tokens and one bucket for the rest [T], that bucket's mass [T])."""
    q = _logits(hidden, weight, valid, temperature).log_softmax(-1).exp().sort(dim=-1, descending=True).values
    tail = q[:, topk:].sum(-1)
    return torch.special.entr(q[:, :topk]).sum(-1) + torch.special.entr(tail), tail


def topk_divergences(
    rule: str, log_p: Tensor, log_q: Tensor, ids: Tensor, log_p_old: Tensor
) -> tuple[Tensor, Tensor]:
    """(forward, reverse) of one token as published, 0 where the rule has none; a function of ``log_p`` alone.

    Args:
        log_p, log_q: [V]. ids: [k]. log_p_old: [V], of the student that the advantages were computed with.
    """
    p, q = log_p[ids].exp(), log_q[ids].exp()
    none = log_p.new_zeros(())
    if rule == "tail":
        p_tail, q_tail = 1 - p.sum(), 1 - q.sum()
        forward = (q * (q / p).log()).sum() + q_tail * (q_tail / p_tail).log()
        return forward, (p * (p / q).log()).sum() + p_tail * (p_tail / q_tail).log()
    if rule == "forward_teacher_norm":
        q_norm = q / q.sum()
        return (q_norm * (q_norm.log() - log_p[ids])).sum(), none
    if rule == "forward_raw":
        return (q * (q.log() - log_p[ids])).sum(), none
    if rule == "reverse_both_norm":
        p_norm, q_norm = p / p.sum(), q / q.sum()
        return none, (p_norm * (p_norm / q_norm).log()).sum()
    p_old = log_p_old[ids].exp()
    weight = {
        "student_topk_policy": p_old / p_old.sum(),
        "student_topk_policy_teacher": q / q.sum(),
        "student_topk_policy_unweighted": torch.ones_like(q),
    }[rule]
    advantage = -(log_p_old[ids] - log_q[ids]) * weight
    return none, -(p / p_old * advantage).sum()


def dense_topk_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    rule: str,
    *,
    valid: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss for torch autograd, its four terms [T, 4]); ``ids`` [T, K] with ``NO_ID`` in empty slots."""
    log_p = _logits(student_hidden, student_weight, valid, temperature).log_softmax(-1)
    log_q = _logits(teacher_hidden, teacher_weight, valid, temperature).log_softmax(-1).detach()
    rows = [
        torch.stack(
            [
                *topk_divergences(rule, log_p[t], log_q[t], ids[t][ids[t] != NO_ID], log_p[t].detach()),
                -(log_p[t].exp() * log_p[t]).sum(),
                log_p[t, labels[t]],
            ]
        )
        for t in range(len(labels))
    ]
    terms = torch.stack(rows)
    return (coefficients.double() * terms).sum(), terms.detach()


def pointwise_entries(log_p: Tensor, log_q: Tensor, rule: PointwiseRule) -> Tensor:
    """min(f, clip) of every vocabulary entry as published, from log-probabilities of student and teacher.

    torch autograd with respect to ``log_p`` gives p g.
    """
    p, q = log_p.exp(), log_q.exp()
    if rule.kind == "forward":
        entries = q * (log_q - log_p)
    elif rule.kind == "reverse":
        entries = p * (log_p - log_q)
    else:
        assert rule.share is not None
        of_teacher = 1 - rule.share if rule.kind == "skew_reverse" else rule.share
        log_m = torch.logaddexp(log_q + math.log(of_teacher), log_p + math.log(1 - of_teacher))
        if rule.kind == "jsd":
            entries = rule.share * q * (log_q - log_m) + (1 - rule.share) * p * (log_p - log_m)
        elif rule.kind == "skew_forward":
            entries = q * (log_q - log_m)
        else:
            entries = p * (log_p - log_m)
    return entries if rule.clip is None else entries.clamp(max=rule.clip)


def dense_pointwise(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rule: PointwiseRule,
    *,
    valid: int,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of each token, [T] float64, which torch autograd differentiates."""
    log_p = _logits(student_hidden, student_weight, valid, temperature).log_softmax(-1)
    log_q = _logits(teacher_hidden, teacher_weight, valid, temperature).log_softmax(-1).detach()
    return pointwise_entries(log_p, log_q, rule).sum(-1)
