"""No operation of a whole step produces a tensor of T * V / 8 elements, counted at the dispatcher.

T * V_local is what a logits tensor has; the tiles here are 1/64 of it. The weight's gradient [V, H] and the
hidden states' [T, H] are counted too: H is small enough that they stay below. The dense oracle is the
positive control.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import TileOptions, split_kl_loss
from sead_kernels.split_kl.reference import dense_loss
from sead_kernels.split_kl.testing import (
    POINTWISE_RULES,
    LargestOutput,
    Problem,
    make_problem,
    run_pointwise,
)
from sead_kernels.split_kl.topk_testing import topk_loss_on_own_topk
from torch.nn import Parameter

TOKENS, VOCABULARY, WIDTH = 128, 1024, 4


def problem_and_leaves(dtype: torch.dtype) -> tuple[Problem, Parameter, torch.Tensor]:
    problem = make_problem(
        tokens=TOKENS,
        valid=VOCABULARY - 5,
        padded=VOCABULARY,
        student_width=WIDTH,
        teacher_width=WIDTH,
        dtype=dtype,
    )
    return problem, Parameter(problem.student_weight), problem.student_hidden.requires_grad_()


def step(dtype: torch.dtype, tiles: TileOptions) -> int:
    """The exact loss, both top-k lists and a loss on them, a pointwise one, forward and backward."""
    problem, weight, hidden = problem_and_leaves(dtype)
    with LargestOutput() as largest:
        split_kl_loss(
            hidden,
            weight,
            problem.teacher_hidden,
            problem.teacher_weight,
            problem.labels,
            problem.coefficients,
            shard=problem.shard(),
            tp_group=None,
            options=tiles,
        ).loss.backward()
        topk_loss_on_own_topk(
            problem, hidden, weight, topk=8, options=tiles, rule="student_topk_policy", support="union"
        ).backward()
        run_pointwise(problem, hidden, weight, POINTWISE_RULES[1], options=tiles).loss.backward()
    assert weight.grad is not None and bool(weight.grad.any())
    return largest.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_temporary_is_far_below_the_logits(dtype: torch.dtype, tiles: TileOptions) -> None:
    """Native kernels allocate nothing: what torch allocates is all there is."""
    assert step(dtype, replace(tiles, tokens=16, vocab=128)) < TOKENS * VOCABULARY / 8


def test_the_trace_sees_the_logits_of_the_dense_loss() -> None:
    problem, weight, hidden = problem_and_leaves(torch.float32)
    inputs = (hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels)
    with LargestOutput() as largest:
        dense_loss(*inputs, problem.coefficients, valid=problem.valid).backward()
    assert largest.numel >= TOKENS * problem.valid
