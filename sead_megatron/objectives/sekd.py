"""SE-KD (arXiv 2602.01395): forward KL where the student is least sure, the same share of every response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.objectives.selection import reduced_to_rollouts, top_share_of_rollouts

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class SekdObjective(ObjectiveSection):
    """SE-KD (arXiv 2602.01395), a method for fixed texts, here on the student's own rollouts.

    Its selection of samples and of vocabulary classes is left out.
    """

    name: Literal["sekd"] = "sekd"
    """`sekd`."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a response's tokens, those of the highest student entropy (the paper: 20 %)."""


class Sekd(Objective[SekdObjective]):
    """Mean over rollouts of the mean forward KL over the ``ceil(share L)`` kept tokens of each."""

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        kept = top_share_of_rollouts(table, table.require("student_entropy"), self.config.share)
        weights, normalizer = reduced_to_rollouts(table, kept.float(), kept)
        return coefficients_of(table, {Term.FORWARD_KL: weights}, normalizer)
