"""PACED (arXiv 2603.11178): prompts weighed by how undecided the initial student is about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import Objective, ObjectiveSection, coefficients_of
from sead_megatron.section import PositiveFloat, Share

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class PacedObjective(ObjectiveSection):
    """PACED (arXiv 2603.11178): ``sum_i w_i L_i / sum_i w_i``, w = p^a (1 - p)^b with the pass rate p of the prompt.

    Forward KL first and reverse KL then is called best; the switch is not published, here in the middle. A prompt that
    is always or never solved weighs nothing: leave such prompts out of the data, their rollouts are wasted.
    """

    name: Literal["paced"] = "paced"
    """`paced`."""
    solved_power: PositiveFloat = 1.0
    """a."""
    unsolved_power: PositiveFloat = 1.0
    """b."""
    switch_at: Share = 0.5
    """Share of the run's steps with forward KL; the rest has reverse KL. 0: reverse only, 1: forward only."""

    needs_difficulty: ClassVar[bool] = True


class Paced(Objective[PacedObjective]):
    """L_i is the mean divergence over the tokens of rollout i."""

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        difficulty = table.facts().difficulty
        if difficulty is None:
            raise ValueError("paced needs the difficulties of the prompts")
        solved = 1 - difficulty.double()
        weights = solved**self.config.solved_power * (1 - solved) ** self.config.unsolved_power
        weights = weights * (table.lengths > 0)
        first = step < self.config.switch_at * self.total_steps
        return coefficients_of(
            table,
            {
                Term.FORWARD_KL if first else Term.REVERSE_KL: table.of_tokens(
                    (weights / table.lengths.clamp_min(1)).float()
                )
            },
            float(weights.sum()),
        )
