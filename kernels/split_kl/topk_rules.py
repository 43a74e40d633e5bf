"""Losses on a support S of few vocabulary entries: each a rule for value and gradient, a line of ``RULES``.

With p the student and q the teacher, softmaxes over the whole vocabulary; P = sum_S p and Q = sum_S q, P' = 1 - P
and Q' = 1 - Q the tails; p~ = p / P and q~ = q / Q on S, 0 elsewhere:

    tail
        FKL = sum_S q ln(q/p) + Q' ln(Q'/P')          dz = p - q on S,             p (1 - Q'/P') off S
        RKL = sum_S p ln(p/q) + P' ln(P'/Q')          dz = p (ln(p/q) - RKL) on S, p (ln(P'/Q') - RKL) off S
    forward_teacher_norm
        FKL = sum_S q~ ln(q~/p)                       dz = p - q~
    forward_raw
        FKL = sum_S q ln(q/p), may be negative        dz = Q p - q on S,           Q p off S
    reverse_both_norm
        RKL = sum_S p~ ln(p~/q~)                      dz = p~ (ln(p~/q~) - RKL),   0 off S
    student_topk_policy
        RKL = -sum_S r A, r = p / constant p = 1,     dz = p sum_S A - A on S,     p sum_S A off S
        constant A = -w ln(p/q), w = p~ (or q~, 1)

The two of ``tail`` are lower bounds of the full divergences (data processing inequality). On the whole vocabulary
all are the full ones, in value and gradient, but for the last with another weight than p~.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import COEFFICIENTS
from .state import SENTINEL
from .topk import NO_ID


class Support(NamedTuple):
    """What a rule sees of both models.

    Attributes:
        held: bool [T, K], False in empty slots.
        log_p, log_q: [T, K], normalised over the whole vocabulary; ``SENTINEL`` in empty slots, so that p = q = 0.
        student_tail, teacher_tail: [T], the masses of all other tokens, at least the dtype's epsilon.
    """

    held: Tensor
    log_p: Tensor
    log_q: Tensor
    student_tail: Tensor
    teacher_tail: Tensor

    @classmethod
    def of(
        cls, ids: Tensor, log_p: Tensor, log_q: Tensor, student_tail: Tensor, teacher_tail: Tensor
    ) -> Support:
        """``ids`` int64 [T, K] with ``topk.NO_ID`` in empty slots; everything in the dtype of ``log_p``."""
        held, epsilon = ids != NO_ID, torch.finfo(log_p.dtype).eps
        return cls(
            held,
            log_p,
            log_q.to(log_p.dtype).masked_fill(~held, SENTINEL),
            student_tail.clamp(min=epsilon),
            teacher_tail.to(log_p.dtype).clamp(min=epsilon),
        )


class Divergence(NamedTuple):
    """``value`` [T], nats, and its gradient: dL/dz_v = ``values`` [T, K] on S and p_v ``offset`` [T] elsewhere."""

    value: Tensor
    offset: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rule:
    """``divergences``: which of ``checks.COEFFICIENTS`` the rule gives a meaning; ``of`` returns them in that order."""

    divergences: tuple[str, ...]
    of: Callable[[Support], tuple[Divergence, ...]]


def resolve_rule(name: str) -> Rule:
    """The rule of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in RULES:
        raise ValueError(f"rule is {name!r}, wanted one of {', '.join(RULES)}")
    return RULES[name]


def check_rule_coefficients(name: str, coefficients: Tensor) -> None:
    """ValueError if a divergence that the rule does not define has a coefficient: it would be dropped, silently."""
    for column, divergence in enumerate(COEFFICIENTS[:2]):
        if divergence not in resolve_rule(name).divergences and bool(coefficients[:, column].any()):
            defined = ", ".join(RULES[name].divergences)
            raise ValueError(
                f"coefficients has a non-zero {divergence}, wanted 0: rule {name!r} defines {defined} only"
            )


def _tail(s: Support) -> tuple[Divergence, Divergence]:
    p, q, log_ratio = s.log_p.exp(), s.log_q.exp(), s.log_q - s.log_p
    tail_ratio = s.teacher_tail.log() - s.student_tail.log()
    forward = (q * log_ratio).sum(1) + s.teacher_tail * tail_ratio
    reverse = -(p * log_ratio).sum(1) - s.student_tail * tail_ratio
    return (
        Divergence(forward, 1 - tail_ratio.exp(), p - q),
        Divergence(reverse, -reverse - tail_ratio, p * (s.log_p - s.log_q - reverse[:, None])),
    )


def _forward_teacher_norm(s: Support) -> tuple[Divergence]:
    log_q, q = _on_support(s.log_q, s.held)
    # 1, and 0 where S is empty.
    mass = q.sum(1)
    return (Divergence((q * (log_q - s.log_p)).sum(1), mass, mass[:, None] * s.log_p.exp() - q),)


def _forward_raw(s: Support) -> tuple[Divergence]:
    q = s.log_q.exp()
    mass = q.sum(1)
    return (Divergence((q * (s.log_q - s.log_p)).sum(1), mass, mass[:, None] * s.log_p.exp() - q),)


def _reverse_both_norm(s: Support) -> tuple[Divergence]:
    (log_p, p), (log_q, _) = _on_support(s.log_p, s.held), _on_support(s.log_q, s.held)
    value = (p * (log_p - log_q)).sum(1)
    return (Divergence(value, torch.zeros_like(value), p * (log_p - log_q - value[:, None])),)


def _policy(weight: Callable[[Support], Tensor]) -> Callable[[Support], tuple[Divergence]]:
    def of(s: Support) -> tuple[Divergence]:
        advantage = weight(s) * (s.log_q - s.log_p)
        total = advantage.sum(1)
        return (Divergence(-total, total, total[:, None] * s.log_p.exp() - advantage),)

    return of


def _on_support(logprobs: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities renormalised on S, [T, K]; no mass at all where S is empty."""
    logprobs = logprobs - logprobs.logsumexp(1, keepdim=True)
    return logprobs, logprobs.exp() * held


# forward_teacher_norm: EOPD, arXiv 2603.07079, equation 10. student_topk_policy and its weights: Rethinking OPD, arXiv
# 2604.13016, on the student's top-k. forward_raw: verl's `forward_kl_topk`, without its clamp at 0.
RULES = {
    "tail": Rule(("forward_kl", "reverse_kl"), _tail),
    "forward_teacher_norm": Rule(("forward_kl",), _forward_teacher_norm),
    "forward_raw": Rule(("forward_kl",), _forward_raw),
    "reverse_both_norm": Rule(("reverse_kl",), _reverse_both_norm),
    "student_topk_policy": Rule(("reverse_kl",), _policy(lambda s: _on_support(s.log_p, s.held)[1])),
    "student_topk_policy_teacher": Rule(("reverse_kl",), _policy(lambda s: _on_support(s.log_q, s.held)[1])),
    "student_topk_policy_unweighted": Rule(("reverse_kl",), _policy(lambda s: torch.ones_like(s.log_p))),
}
