"""Who works on which rollout: the plan of one step, the same on every rank because it is computed from the same facts.

Model-parallel blocks of the student and the teacher nest: the larger one's ranks are a whole number of the smaller
one's blocks. A teacher replica scores rollouts of the student replicas on its own ranks, so hidden states never
leave the larger block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sead_megatron.data.packing import assign_to_replicas
from sead_megatron.data.types import Rollout
from sead_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class StepPlan:
    """Assignment of the global batch: indices into the step's rollouts, ascending in every list.

    Attributes:
        rollouts: the global batch, in prompt order.
        teacher_rollouts: the same responses behind the prompts that the teacher reads.
        offsets: int64 [S + 1], the range of response tokens of each rollout in the TokenTable.
        layout: the student's.
        student: for each student replica, the rollouts it trains on.
        teacher_of: for each rollout, which of the teachers scores it.
    """

    rollouts: Sequence[Rollout]
    teacher_rollouts: Sequence[Rollout]
    offsets: Tensor
    layout: Layout
    student: list[list[int]]
    teacher_of: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Response tokens of the global batch."""
        return int(self.offsets[-1])

    def labels(self, token_index: Tensor) -> Tensor:
        """Response tokens by their TokenTable indices, int64."""
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *(r.trained_ids for r in self.rollouts)])
        return torch.from_numpy(tokens).long()[token_index]

    def token_indices(self, rollouts: Sequence[int]) -> Tensor:
        """TokenTable indices of the response tokens of some rollouts, int64, in the given order."""
        ranges = [torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in rollouts]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def rollouts_of(self, teacher: int) -> list[int]:
        """The rollouts that a teacher scores."""
        return [i for i, of in enumerate(self.teacher_of) if of == teacher]

    def scoring(self, rollouts: Sequence[int], layout: Layout) -> Scoring:
        """Who scores `rollouts` with a frozen model in `layout`: each block's are balanced over its replicas inside."""
        lengths = [rollout.length for rollout in self.teacher_rollouts]
        scored = set(rollouts)
        student = [[i for i in replica if i in scored] for replica in self.student]
        block = max(self.layout.block_size, layout.block_size)
        students_in_block = block // self.layout.block_size
        frozen: list[list[int]] = []
        for first in range(0, self.layout.data, students_in_block):
            mine = sorted(i for replica in student[first : first + students_in_block] for i in replica)
            shares = assign_to_replicas([lengths[i] for i in mine], block // layout.block_size)
            frozen.extend([mine[j] for j in share] for share in shares)
        return Scoring(student, frozen)


@dataclass(frozen=True)
class Scoring:
    """Assignment of the rollouts that one frozen model scores; ascending in every list, any of which may be empty.

    Attributes:
        student: for each student replica, those that it trains on.
        frozen: for each replica of the frozen model, those that it scores.
    """

    student: list[list[int]]
    frozen: list[list[int]]


def plan_step(
    rollouts: Sequence[Rollout], student: Layout, teacher_of: Sequence[int] | None = None
) -> StepPlan:
    """Balances rollouts over student replicas by tokens. `teacher_of`: by default one teacher scores all of them."""
    trained = torch.tensor([0] + [len(r.trained_positions) for r in rollouts], dtype=torch.int64)
    return StepPlan(
        rollouts,
        [rollout.as_read_by_teacher() for rollout in rollouts],
        trained.cumsum(0),
        student,
        assign_to_replicas([rollout.length for rollout in rollouts], student.data),
        [0] * len(rollouts) if teacher_of is None else teacher_of,
    )
