"""AKL (arXiv 2404.02657): forward and reverse KL, mixed by where the models disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import MixtureSection, Objective, coefficients_of

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class AklObjective(MixtureSection):
    """AKL (arXiv 2404.02657): ``(g_head FKL + g_tail RKL) / (g_head + g_tail)`` with detached gaps.

    The gap g is ``sum |p - q|``, over the smallest set of tokens with half of the teacher's probability (head) and over
    the others (tail). The paper distils on fixed texts.
    """

    name: Literal["akl"] = "akl"
    """`akl`."""
    topk: Annotated[int, Field(gt=1, le=128)] = 64
    """Longest head: where so many tokens hold less than half of the teacher's probability, they are the head."""


class Akl(Objective[AklObjective]):
    """Mean over all response tokens. Where the models agree in everything both weights are a half."""

    @property
    def topk_lists(self) -> int:
        return self.config.topk

    def needs_token_stats(self, step: int) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        head, tail = table.require("gap_head").double(), table.require("gap_tail").double()
        total = head + tail
        forward = (head / total).where(total > 0, head.new_full((), 0.5)).float()
        terms = {Term.FORWARD_KL: forward, Term.REVERSE_KL: 1 - forward}
        return coefficients_of(table, terms, float(table.num_tokens))
