"""Top-k OPD ("rethinking", arXiv 2604.13016): a policy gradient over the student's likeliest tokens at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term, TopK
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable

_RULES = {
    "student": "student_topk_policy",
    "teacher": "student_topk_policy_teacher",
    "none": "student_topk_policy_unweighted",
}


class TopkOpdObjective(ObjectiveSection):
    """Rethinking OPD (arXiv 2604.13016): ``-sum_S A_v log q_v``, A_v = -w_v (log q_v - log p_v), detached.

    On the whole vocabulary this is the gradient of the reverse KL.
    """

    name: Literal["topk_opd"] = "topk_opd"
    """`topk_opd`."""
    topk: Annotated[int, Field(gt=0, le=128)] = 16
    """k of the support (the paper: 16)."""
    support: Literal["student", "teacher", "union", "intersection"] = "student"
    """Whose k most likely tokens make up S."""
    weight: Literal["student", "teacher", "none"] = "student"
    """w: the student's probabilities renormalised on S, the teacher's, or 1."""


class TopkOpd(Objective[TopkOpdObjective]):
    """Mean over all response tokens."""

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        rule = TopK(_RULES[self.config.weight], self.config.topk, self.config.support)
        terms = {Term.REVERSE_KL: 1.0}
        return coefficients_of(table, terms, float(table.num_tokens), divergence=rule)
