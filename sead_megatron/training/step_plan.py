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
        student: for each student replica, the rollouts it trains on.
        teacher: for each teacher replica, the rollouts it scores.
    """

    rollouts: Sequence[Rollout]
    teacher_rollouts: Sequence[Rollout]
    offsets: Tensor
    student: list[list[int]]
    teacher: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Response tokens of the global batch."""
        return int(self.offsets[-1])

    def labels(self, token_index: Tensor) -> Tensor:
        """Response tokens by their TokenTable indices, int64."""
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *(r.response_ids for r in self.rollouts)])
        return torch.from_numpy(tokens).long()[token_index]

    def token_indices(self, rollouts: Sequence[int]) -> Tensor:
        """TokenTable indices of the response tokens of some rollouts, int64, in the given order."""
        ranges = [torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in rollouts]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def plan_step(rollouts: Sequence[Rollout], student: Layout, teacher: Layout) -> StepPlan:
    """Balances rollouts over student replicas by tokens, then each block's over the teacher replicas inside it."""
    lengths = [rollout.length for rollout in rollouts]
    teacher_rollouts = [rollout.as_read_by_teacher() for rollout in rollouts]
    teacher_lengths = [rollout.length for rollout in teacher_rollouts]
    responses = torch.tensor([0] + [len(rollout.response_ids) for rollout in rollouts], dtype=torch.int64)
    student_assignment = assign_to_replicas(lengths, student.data)
    block = max(student.block_size, teacher.block_size)
    students_in_block = block // student.block_size
    teachers_in_block = block // teacher.block_size
    teacher_assignment: list[list[int]] = []
    for first in range(0, student.data, students_in_block):
        mine = sorted(i for replica in student_assignment[first : first + students_in_block] for i in replica)
        shares = assign_to_replicas([teacher_lengths[i] for i in mine], teachers_in_block)
        teacher_assignment.extend([mine[j] for j in share] for share in shares)
    return StepPlan(rollouts, teacher_rollouts, responses.cumsum(0), student_assignment, teacher_assignment)
