"""All teachers of a run: each rollout is scored by the one of its prompt's domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sead_megatron.training.device_rows import TeacherRows
from sead_megatron.training.step_plan import StepPlan
from sead_megatron.training.teacher import Teacher, TeacherScores


@dataclass(frozen=True, eq=False)
class Teachers:
    """Frozen models over the same ranks, in the order of `teacher.directories`."""

    members: Sequence[Teacher]

    @property
    def megatron_configs(self) -> list[Any]:
        """Megatron's configurations of the teachers."""
        return [member.module.config for member in self.members]

    def score(self, plan: StepPlan) -> Scores | None:
        """Every teacher's scores of this rank's rollouts; None on ranks without a part of the student's output layer.

        One teacher after the other, each a collective of its blocks, also of one that has no rollout in this step.
        """
        parts = [member.score(plan, plan.rollouts_of(i)) for i, member in enumerate(self.members)]
        present = [part for part in parts if part is not None]
        return Scores(present) if present else None


@dataclass(frozen=True, eq=False)
class Scores:
    """What a student rank of the last stage holds of all teachers; no token is in two `parts`."""

    parts: Sequence[TeacherScores]

    def rows(self, token_index: Tensor) -> TeacherRows:
        """What the loss reads of the teacher that scored these tokens (indices on the CPU).

        Raises ValueError for tokens of several teachers.
        """
        for part in self.parts:
            if part.holds(token_index):
                return part.rows(token_index)
        raise ValueError("a row holds tokens of several teachers")
