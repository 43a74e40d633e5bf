"""OPSD (arXiv 2601.18734) and PW-OPSD (arXiv 2605.21606): the student's own model, shown a solution, is the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Pointwise, Term
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.objectives.selection import reduced_to_rollouts
from sead_megatron.section import PositiveFloat, Section, Share

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable


class PositionWeights(Section):
    """``w = w_min + (1 - w_min) sigmoid((f - tau) / s)`` of the place f in (0, 1) of a token in its response."""

    smallest: Share = 0.25
    """w_min."""
    middle: float = 0.3
    """tau."""
    width: PositiveFloat = 0.1
    """s."""


class OpsdObjective(ObjectiveSection):
    """OPSD (arXiv 2601.18734): a divergence to a teacher that reads a gold solution; `positions` makes it PW-OPSD.

    The teacher is the initial student in the paper: `teacher.path` is then `student.path`.
    """

    name: Literal["opsd"] = "opsd"
    """`opsd`."""
    divergence: Literal["jsd", "forward", "reverse"] = "jsd"
    """`jsd`: as in `gkd`, with `share`."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """b of `jsd`."""
    clip: PositiveFloat | None = Field(default=0.05, examples=[0.05])
    """The most that one vocabulary entry adds to a token's divergence (0.05 in later recipes); null for no limit."""
    positions: PositionWeights | None = Field(
        default=None, examples=[{"smallest": 0.25, "middle": 0.3, "width": 0.1}]
    )
    """Weights by position, and the mean over rollouts in place of tokens (PW-OPSD). Default: none."""

    @property
    def needs_solutions(self) -> bool:
        return True


class Opsd(Objective[OpsdObjective]):
    """Mean over all response tokens, or with `positions` the mean over rollouts of each one's weighted mean."""

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        config = self.config
        rule = Pointwise(config.divergence, config.share if config.divergence == "jsd" else None, config.clip)
        if config.positions is None:
            terms: dict[Term, Tensor | float] = {Term.FORWARD_KL: 1.0}
            return coefficients_of(table, terms, float(table.num_tokens), divergence=rule)
        weights, normalizer = reduced_to_rollouts(table, self.position_weights(table, config.positions))
        return coefficients_of(table, {Term.FORWARD_KL: weights}, normalizer, divergence=rule)

    def position_weights(self, table: TokenTable, positions: PositionWeights) -> Tensor:
        """w, float32 [N]. A token's place is the middle of its share of its own response."""
        place = (table.position() + 0.5) / table.of_tokens(table.lengths)
        gate = ((place - positions.middle) / positions.width).sigmoid()
        return (positions.smallest + (1 - positions.smallest) * gate).float()
