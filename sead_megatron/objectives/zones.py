"""SEAD's token zones (arXiv 2606.28562, section 2.3), by exact rank or by absolute thresholds.

The paper gives the shares (50/40/10 %) but neither the population, nor the ranked quantity, nor the order.
The reading here is the one its Table 3 supports (the shares hold exactly over the pooled tokens, zone C
follows the teacher):

1. the population is every response token of the global batch;
2. C, forward KL: the ``share_c`` % with the highest teacher entropy;
3. A, skipped: among the rest, the ``share_a`` % *of all tokens* with the lowest joint score;
4. B, reverse KL: the remainder.

Assignment is by rank and not by comparison with a quantile, because entropies near 0 are massively tied and a
threshold would put all or none of a tie into a zone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from sead_megatron.data.terms import Zone

if TYPE_CHECKING:
    from torch import Tensor

ZoneScore = Literal["max_rank", "student", "sum_rank"]


def zone_counts(num_tokens: int, share_a: float, share_c: float) -> tuple[int, int, int]:
    """Token counts of A, B and C for shares in percent.

    A and C are rounded to the nearest integer; an exact half goes to the zone that is trained (A rounds down,
    C up), so a batch of one token is trained on. B takes the remainder: each count is less than 1 from its
    exact share, B is empty when its share is 0, and the sum is always ``num_tokens``. The arithmetic is exact
    (29 % of 100 is 29).
    """
    half = Fraction(1, 2)
    exact_a, exact_c = (Fraction(str(share)) * num_tokens / 100 for share in (share_a, share_c))
    count_a, count_c = math.ceil(exact_a - half), math.floor(exact_c + half)
    return count_a, num_tokens - count_a - count_c, count_c


def assign_by_rank(
    teacher_entropy: Tensor,
    student_entropy: Tensor,
    share_a: float,
    share_c: float,
    score: ZoneScore = "max_rank",
) -> Tensor:
    """Zones with exact shares.

    Args:
        teacher_entropy, student_entropy: [N], any unit (only their order counts).
        share_a, share_c: percent of all N tokens; B has the rest. See ``zone_counts`` for the rounding.
        score: what "both entropies low" ranks by, lowest first. Ranks are over all N tokens.
            ``max_rank``: the larger of the two; ``student``: the student's; ``sum_rank``: their sum.

    Returns:
        int8 [N] of ``Zone`` values.

    Equal entropies rank in table order, so the earlier token is the lower one. Two tokens can also share a
    score without sharing an entropy; then the one with the lower student rank goes to A first (low teacher
    and high student entropy is what B is for). So, without equal entropies, the zones do not depend on the
    order of the table at all. NaN ranks as the highest entropy. O(N log N).
    """
    num_tokens = len(teacher_entropy)
    count_a, _, count_c = zone_counts(num_tokens, share_a, share_c)
    zones = teacher_entropy.new_full((num_tokens,), Zone.B).char()
    teacher_order = teacher_entropy.argsort(stable=True)
    student_order = student_entropy.argsort(stable=True)
    zones[teacher_order[num_tokens - count_c :]] = Zone.C

    # The inverse of a permutation sorts it.
    teacher_rank, student_rank = teacher_order.argsort(), student_order.argsort()
    if score == "max_rank":
        joint = teacher_rank.maximum(student_rank)
    elif score == "sum_rank":
        joint = teacher_rank + student_rank
    else:
        joint = student_rank
    # Candidates in student order: the stable sort then breaks equal scores by the student's rank.
    rest = student_order[zones[student_order] != Zone.C]
    zones[rest[joint[rest].argsort(stable=True)[:count_a]]] = Zone.A
    return zones


@dataclass(frozen=True)
class ZoneThresholds:
    """Entropies in nats that bound the zones.

    Attributes:
        teacher: C is ``H_teacher >= teacher``; +inf for an empty C.
        a_teacher, a_student: A is what is left with ``H_teacher <= a_teacher and H_student <= a_student``;
            -inf for an empty A. ``a_teacher`` is +inf when A is scored by the student alone.
    """

    teacher: float
    a_teacher: float
    a_student: float

    @property
    def joint(self) -> float:
        """The tau of Theorem 1: no token of A has a teacher or a student entropy above it."""
        return max(self.a_teacher, self.a_student)

    def metrics(self) -> dict[str, float]:
        """``zone/threshold_*``; a bound of an empty zone is left out."""
        values = {
            "zone/threshold_teacher": self.teacher,
            "zone/threshold_a_teacher": self.a_teacher,
            "zone/threshold_a_student": self.a_student,
            "zone/threshold_joint": self.joint,
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}


def implied_thresholds(
    zones: Tensor, teacher_entropy: Tensor, student_entropy: Tensor, score: ZoneScore = "max_rank"
) -> ZoneThresholds:
    """The thresholds a rank assignment amounts to: the smallest teacher entropy in C, the largest entropies
    in A.

    For ``max_rank`` and ``student``, and without equal entropies, ``assign_by_threshold`` with them gives the
    same zones back. ``sum_rank`` has no such pair of thresholds; there they only describe the zones.
    """
    in_a, in_c = zones == Zone.A, zones == Zone.C
    any_a, any_c = bool(in_a.any()), bool(in_c.any())
    a_teacher = float(teacher_entropy[in_a].max()) if any_a else -math.inf
    return ZoneThresholds(
        teacher=float(teacher_entropy[in_c].min()) if any_c else math.inf,
        a_teacher=math.inf if score == "student" and any_a else a_teacher,
        a_student=float(student_entropy[in_a].max()) if any_a else -math.inf,
    )


def assign_by_threshold(
    teacher_entropy: Tensor, student_entropy: Tensor, thresholds: ZoneThresholds
) -> Tensor:
    """Zones by fixed entropies, int8 [N]: their shares follow the models instead of staying constant. NaN
    goes to B."""
    zones = teacher_entropy.new_full((len(teacher_entropy),), Zone.B).char()
    low_in_both = (teacher_entropy <= thresholds.a_teacher) & (student_entropy <= thresholds.a_student)
    zones[low_in_both] = Zone.A
    zones[teacher_entropy >= thresholds.teacher] = Zone.C
    return zones
