"""TIP (arXiv 2604.14084): reverse KL on the tokens with a high student entropy or a high divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.objectives.selection import rescaled, top_share

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class TipObjective(ObjectiveSection):
    """TIP (arXiv 2604.14084): ``1/|T| sum_T RKL_t`` over the tokens T with the largest soft-or of both signals."""

    name: Literal["tip"] = "tip"
    """`tip`."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the response tokens of the global batch that is trained on (the paper's main setting: 0.5)."""
    scale: Literal["minmax", "quantiles"] = "minmax"
    """How both signals come to [0, 1] over the batch. `minmax`: as in the paper, one outlier can squeeze the others.
    `quantiles`: from the 5 % to the 95 % quantile, clamped."""


class Tip(Objective[TipObjective]):
    """Score ``s = h + d - h d`` of the rescaled student entropy h and reverse KL d; exactly ``ceil(share N)`` are kept.

    The authors' tool samples tokens instead; this is the deterministic selection of the paper.
    """

    def needs_token_stats(self, step: int) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        quantiles = (0.0, 1.0) if self.config.scale == "minmax" else (0.05, 0.95)
        entropy = rescaled(table.require("student_entropy"), *quantiles)
        divergence = rescaled(table.require("reverse_kl"), *quantiles)
        kept = top_share(entropy + divergence - entropy * divergence, self.config.share)
        return coefficients_of(table, {Term.REVERSE_KL: kept.float()}, float(kept.sum()))
