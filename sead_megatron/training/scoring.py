"""The frozen models' columns of the token table: entropies and logprobs of the sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sead_megatron.data.types import TokenTable
from sead_megatron.objectives import Objective
from sead_megatron.training.models import Models
from sead_megatron.training.step_plan import StepPlan
from sead_megatron.training.teacher import TeacherScores, teacher_columns, teacher_statistics
from sead_megatron.training.token_columns import share_columns


def with_teacher_columns(
    models: Models, objective: Objective, plan: StepPlan, scores: TeacherScores | None, table: TokenTable
) -> TokenTable:
    """Adds the teacher's entropy and logprob, when the objective reads one and its own statistics will not bring it.

    A collective over the world.
    """
    entropy = objective.needs_teacher_entropy and (
        not objective.uses_trainer_entropy or objective.teacher_topk
    )
    if not entropy and not objective.needs_teacher_logprob:
        return table
    measured = _measure(models, models.teacher_output, objective.teacher_topk, plan, scores)
    return table.with_columns(**measured)


def with_reference_column(models: Models, plan: StepPlan, table: TokenTable) -> TokenTable:
    """Adds the reference model's logprobs of the sampled tokens, where there is one (a collective over the world)."""
    if models.reference is None:
        return table
    scores = models.reference.score(plan)
    measured = _measure(models, models.reference_output, 0, plan, scores)
    return table.with_columns(reference_logprob=measured["teacher_logprob"])


def _measure(
    models: Models, output: Tensor | None, topk: int, plan: StepPlan, scores: TeacherScores | None
) -> dict[str, Tensor]:
    """`teacher_columns(topk)` of a frozen model, [N], equal on all ranks."""
    student = models.student
    measured: dict[str, Tensor] = {}
    token_index: torch.Tensor | None = None
    if scores is not None and output is not None:
        token_index = scores.token_index
        measured = teacher_statistics(
            scores,
            output,
            plan.labels(token_index),
            student.model.groups,
            student.shard,
            temperature=student.temperature,
            topk=topk,
            options=student.tile_options,
        )
    return share_columns(
        teacher_columns(topk), measured, token_index, plan.num_tokens, student.model.groups, student.device
    )
