"""What is said of frozen models that give a NaN or an infinity: which of them, how many tokens, the first's prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from sead_megatron.parallel.layout import Layout
from sead_megatron.training.nonfinite import Blame, FrozenModels
from sead_megatron.training.step_plan import StepPlan, plan_step
from tests.tiny_models import fixed_rollout

PROMPTS: Any = [SimpleNamespace(id=f"p{i}") for i in range(4)]
LENGTHS = [2, 0, 3, 1]  # the second response is empty


def make_plan(teacher_of: list[int]) -> StepPlan:
    rollouts = [replace(fixed_rollout([5], [7] * n), prompt_index=i) for i, n in enumerate(LENGTHS)]
    return plan_step(rollouts, Layout(1, 1, 1), teacher_of)


def column(bad: dict[int, float]) -> torch.Tensor:
    values = torch.ones(sum(LENGTHS))
    for token, value in bad.items():
        values[token] = value
    return values


def test_each_teacher_is_told_with_its_own_tokens() -> None:
    frozen = FrozenModels(["the teacher A", "the maths teacher B"], None, PROMPTS)
    columns = {
        "teacher_entropy": column({1: float("nan"), 3: float("inf")}),
        "teacher_logprob": column({4: -float("inf"), 3: float("nan")}),
        "forward_kl": column({0: float("nan")}),  # the student's too
    }
    assert frozen.blame_for_columns(make_plan([0, 0, 1, 1]), columns) == Blame(
        3,
        "the teacher A gave non-finite statistics for 1 of 6 response tokens, first in the response to prompt 'p0'; "
        "the maths teacher B gave non-finite statistics for 2 of 6 response tokens, first in the response to prompt "
        "'p2'",
    )


def test_the_reference_model() -> None:
    frozen = FrozenModels(["the teacher A"], "the reference model R", PROMPTS)
    columns = {"teacher_entropy": column({}), "reference_logprob": column({5: float("nan")})}
    assert frozen.blame_for_columns(make_plan([0] * 4), columns) == Blame(
        1,
        "the reference model R gave non-finite logprobs for 1 of 6 response tokens, first in the response to prompt "
        "'p3'",
    )


def test_finite_columns_and_none() -> None:
    plan = make_plan([0] * 4)
    frozen = FrozenModels(["the teacher A"], None, PROMPTS)
    assert frozen.blame_for_columns(plan, {"teacher_entropy": column({})}) is None
    assert frozen.blame_for_columns(plan, {"student_entropy": column({0: float("nan")})}) is None
    # Without a teacher the columns are those of a cache.
    nobody = FrozenModels([], None, PROMPTS)
    assert nobody.blame_for_columns(plan, {"teacher_logprob": column({0: float("nan")})}) is None
