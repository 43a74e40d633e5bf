"""The frozen models' columns of the token table: entropies and logprobs of the sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sead_megatron.data.types import TokenTable
from sead_megatron.objectives import Objective
from sead_megatron.training.device_rows import check_labels, to_device
from sead_megatron.training.models import Models
from sead_megatron.training.step_plan import StepPlan
from sead_megatron.training.teacher import TeacherScores, teacher_columns, teacher_statistics
from sead_megatron.training.teachers import Scores
from sead_megatron.training.token_columns import share_columns


def with_teacher_columns(
    models: Models, objective: Objective, plan: StepPlan, scores: Scores | None, table: TokenTable
) -> TokenTable:
    """Adds the teacher's entropy and logprob, when the objective reads one and its own statistics will not bring it.

    A collective over the world. Without a teacher the table keeps what the rollouts brought.
    """
    if not models.teachers.members:
        return table
    entropy = objective.needs_teacher_entropy and (
        not objective.uses_trainer_entropy or objective.teacher_topk
    )
    if not entropy and not objective.needs_teacher_logprob:
        return table
    parts = [] if scores is None else scores.parts
    return table.with_columns(**_measure(models, parts, objective.teacher_topk, plan))


def with_reference_column(models: Models, plan: StepPlan, table: TokenTable) -> TokenTable:
    """Adds the reference model's logprobs of the sampled tokens, where there is one (a collective over the world)."""
    if models.reference is None:
        return table
    scores = models.reference.score(plan, range(len(plan.rollouts)))
    measured = _measure(models, [] if scores is None else [scores], 0, plan)
    return table.with_columns(reference_logprob=measured["teacher_logprob"])


def _measure(models: Models, parts: Sequence[TeacherScores], topk: int, plan: StepPlan) -> dict[str, Tensor]:
    """`teacher_columns(topk)` of frozen models that scored all tokens between them, [N], equal on all ranks."""
    student = models.student
    names = teacher_columns(topk)
    measured = [
        teacher_statistics(
            part,
            check_labels(plan.labels(part.token_index), student.shard.valid),
            student.model.groups,
            student.shard,
            temperature=student.temperature,
            topk=topk,
            options=student.tile_options,
        )
        for part in parts
    ]
    columns = {name: torch.cat([part[name] for part in measured]) for name in names if measured}
    token_index = None
    if parts:
        token_index = to_device(torch.cat([part.token_index for part in parts]), student.device)
    return share_columns(names, columns, token_index, plan.num_tokens, student.model.groups, student.device)
