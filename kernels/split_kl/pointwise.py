"""Divergences that are a sum over the vocabulary of a function of both log-probabilities of an entry.

With p the student, q the teacher, lp = ln p and lq = ln q at the temperature, a pointwise divergence of a token is

    D = sum_v min(f(lp_v, lq_v), clip)          f as in ``POINTWISE_KINDS``, clip infinite if there is none

Where an entry is clamped its gradient is 0, so with g_v = dD/dp_v

    dD/dz_v = p_v (g_v - sum_u p_u g_u) / temperature

Every f is one formula of four numbers (:class:`RuleNumbers`), two divergences to a mixture m = t q + s p:

    f   = A q ln(q/m) + B p ln(p/m)
    p g = B p (ln(p/m) + 1 - r) - A q r                                   r = s p / m

    kind           f                                     m                     A       B       t       s
    jsd            b q ln(q/m) + (1-b) p ln(p/m)         b q + (1-b) p         b       1-b     b       1-b
    skew_forward   q ln(q/m)                             a q + (1-a) p         1       0       a       1-a
    skew_reverse   p ln(p/m)                             a p + (1-a) q         0       1       1-a     a
    forward        q ln(q/p)                             p                     1       0       0       1
    reverse        p ln(p/q)                             q                     0       1       1       0

p g is computed without a division by p. With c = ln(s p) - ln(t q), e = e^-|c| and L = ln(1 + e), everything is a
function of lp - lq that cannot overflow: r = 1/(1+e) if c > 0 and e/(1+e) if not,

    ln(q/m) = min(-ln t, lq - lp - ln s) - L          ln(p/m) = min(-ln s, lp - lq - ln t) - L

which is m by logaddexp. ln 0 is -1e30: forward and reverse fall out as the two ends, to the last bit.

Sources: jsd as in GKD (arXiv 2306.13649) and TRL; skew divergences as in DistiLLM (arXiv 2402.03898); the clip of every
vocabulary entry before the sum as in PW-OPSD's code (arXiv 2605.21606, there 0.05).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .state import SENTINEL, TokenStats

POINTWISE_KINDS = ("jsd", "skew_forward", "skew_reverse", "forward", "reverse")
_MIXED = POINTWISE_KINDS[:3]

# Rows of ``linear_pointwise_stats``: D, sum_v p_v g_v, sum_v p_v, and sum_v |p_v - q_v|. The mean of g is the second
# over the third, which is 1 but for the rounding of the log-sum-exp: that would leave p times the mean times it.
SUMS = ("divergence", "moment", "mass", "gap")


class RuleNumbers(NamedTuple):
    """What a kernel knows of a rule: A, B, ln t, ln s and the clip (infinite if there is none)."""

    teacher_term: float
    student_term: float
    log_teacher: float
    log_student: float
    clip: float


@dataclass(frozen=True)
class PointwiseRule:
    """One pointwise divergence.

    Attributes:
        kind: one of ``POINTWISE_KINDS``.
        share: of ``jsd`` the teacher's weight b in the mixture and in the sum; of ``skew_forward`` and
            ``skew_reverse`` the weight a of the distribution that is compared with the mixture; 0 < share < 1.
            ``jsd`` over b tends to ``forward`` as b goes to 0, and over 1-b to ``reverse`` as b goes to 1: at share
            0.01 it is about 100 times smaller than the divergence that others put at 0. None for ``forward`` and
            ``reverse``.
        clip: the most that one vocabulary entry may add to the sum, nats; None for no limit. Without one
            ``split_kl_loss`` computes ``forward`` and ``reverse`` with two GEMMs less.

    Raises:
        ValueError: naming the field, what it got and what it wanted.
    """

    kind: str
    share: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in POINTWISE_KINDS:
            raise ValueError(f"PointwiseRule.kind is {self.kind!r}, wanted one of {POINTWISE_KINDS}")
        if self.kind not in _MIXED and self.share is not None:
            raise ValueError(
                f"PointwiseRule.share is {self.share}, wanted None: kind {self.kind!r} has no mixture"
            )
        if self.kind in _MIXED and (self.share is None or not 0 < self.share < 1):
            raise ValueError(
                f"PointwiseRule.share is {self.share}, wanted 0 < share < 1 for kind {self.kind!r} "
                "(the ends are kinds 'forward' and 'reverse', or 0)"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"PointwiseRule.clip is {self.clip}, wanted > 0 and finite, or None for no clip")

    def numbers(self) -> RuleNumbers:
        """The rule as the kernels take it."""
        clip = math.inf if self.clip is None else self.clip
        if self.kind == "forward":
            return RuleNumbers(1.0, 0.0, SENTINEL, 0.0, clip)
        if self.kind == "reverse":
            return RuleNumbers(0.0, 1.0, 0.0, SENTINEL, clip)
        assert self.share is not None
        log_share, log_rest = math.log(self.share), math.log1p(-self.share)
        if self.kind == "jsd":
            return RuleNumbers(self.share, 1 - self.share, log_share, log_rest, clip)
        if self.kind == "skew_forward":
            return RuleNumbers(1.0, 0.0, log_share, log_rest, clip)
        return RuleNumbers(0.0, 1.0, log_rest, log_share, clip)


def pack_pointwise_scalars(
    stats: TokenStats, mean: Tensor, coefficients: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """[4, T]: both log-sum-exps, M = ``mean`` of g, c = the coefficient over the temperature; dz = c (p g - p M)."""
    rows = [stats.student_lse, stats.teacher_lse, mean, coefficients.to(dtype) / temperature]
    return torch.stack([row.to(dtype) for row in rows])
