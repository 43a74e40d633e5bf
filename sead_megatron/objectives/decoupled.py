"""Decoupled KL mixing (arXiv 2605.16826): forward and reverse KL on every token, responses that grow with entropy."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sead_megatron.data.terms import Term
from sead_megatron.errors import UserError
from sead_megatron.objectives.base import MixtureSection, Objective, coefficients_of
from sead_megatron.section import PositiveInt, Share

if TYPE_CHECKING:
    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Coefficients, TokenTable

# Of the running mean of the student's entropy that opens the next length.
_EMA_DECAY = 0.9


class DecoupledObjective(MixtureSection):
    """``mu FKL + (1 - mu) RKL`` (arXiv 2605.16826), with a curriculum of lengths.

    On the student's prefixes, with `student_share: 0` on those of the data, such as the teacher's.

    Only the abstract was at hand: mu, the lengths and the gate are not published, all defaults are ours.
    """

    name: Literal["decoupled"] = "decoupled"
    """`decoupled`."""
    mu: Share = 0.5
    """Weight of the forward KL."""
    lengths: list[PositiveInt] = Field(default=[], examples=[[1024, 2048, 4096]])
    """Longest response of each stage, ascending; after the last one `rollout.max_new_tokens`. Empty: no curriculum."""
    steps_per_stage: PositiveInt = 20
    """Steps that a stage lasts at least."""
    healthy_entropy: Annotated[float, Field(gt=0)] = 0.8
    """A stage ends only while the running mean of the student's entropy is at least this part of the first step's."""

    def check(self, config: TrainConfig) -> None:
        if self.lengths and self.student_share < 1:
            raise UserError(
                "objective.student_share",
                self.student_share,
                "must be 1 with objective.lengths, which follow the entropy of rollouts",
                "use 1, or no lengths",
            )
        limits = [*self.lengths, config.rollout.max_new_tokens]
        if any(later <= earlier for earlier, later in pairwise(limits)):
            raise UserError(
                "objective.lengths",
                self.lengths,
                f"must ascend and stay below rollout.max_new_tokens ({config.rollout.max_new_tokens})",
                "use for example [1024, 2048, 4096]",
            )


class Decoupled(Objective[DecoupledObjective]):
    """Mean over all response tokens; the state is the stage and the running entropy."""

    def __init__(self, config: DecoupledObjective, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self._stage, self._began = 0, 0
        self._first: float | None = None
        self._running: float | None = None

    def longest_response(self, step: int) -> int | None:
        lengths = self.config.lengths
        return lengths[self._stage] if self._stage < len(lengths) else None

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        weights = {Term.FORWARD_KL: self.config.mu, Term.REVERSE_KL: 1 - self.config.mu}
        metrics = {"length_curriculum/stage": float(self._stage)}
        if self.config.lengths and table.num_tokens:
            self._observe(float(table.require("student_entropy").double().mean()), step)
        return coefficients_of(table, weights, float(table.num_tokens), metrics=metrics)

    def _observe(self, entropy: float, step: int) -> None:
        if self._first is None or self._running is None:
            self._first = self._running = entropy
        self._running = _EMA_DECAY * self._running + (1 - _EMA_DECAY) * entropy
        long_enough = step + 1 - self._began >= self.config.steps_per_stage
        if long_enough and self._running >= self.config.healthy_entropy * self._first:
            self._stage, self._began = self._stage + 1, step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "began": self._began, "first": self._first, "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"stage", "began", "first", "running"}:
            raise ValueError(f"not a state of decoupled: {sorted(state)}")
        self._stage, self._began = state["stage"], state["began"]
        self._first, self._running = state["first"], state["running"]
