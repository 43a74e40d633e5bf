"""What a loss reads back from the device: nothing, for a caller that knows the active rows and has checked the ids.

Fake tensors have shapes and no values. Whatever wants a value of one raises here, and waits for the device on a GPU.
The ``torch`` backend stands for all of them: what waits is outside the tiles (but for the top-k of that backend).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from sead_kernels.split_kl import (
    PointwiseRule,
    TileOptions,
    linear_stats,
    split_kl_loss,
    topk_loss,
)
from sead_kernels.split_kl.testing import Problem, coefficients_of, make_problem, run_pointwise
from sead_kernels.split_kl.topk_testing import dense_target
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import Parameter

TILES = TileOptions(backend="torch", tokens=7, vocab=24)
READS = (DataDependentOutputException, DynamicOutputShapeException)


def exact(problem: Problem, hidden: Tensor, weight: Tensor, target: Any, **settings: Any) -> Any:
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    return split_kl_loss(hidden, weight, *teacher, problem.labels, problem.coefficients, **settings)


def topk(problem: Problem, hidden: Tensor, weight: Tensor, target: Any, **settings: Any) -> Any:
    coefficients = coefficients_of("forward_raw", problem)
    return topk_loss(hidden, weight, target, problem.labels, coefficients, rule="forward_raw", **settings)


def pointwise(problem: Problem, hidden: Tensor, weight: Tensor, target: Any, **settings: Any) -> Any:
    return run_pointwise(problem, hidden, weight, PointwiseRule("jsd", 0.5, clip=0.05), **settings)


LOSSES: list[Callable[..., Any]] = [exact, topk, pointwise]


def inputs(problem: Problem) -> dict[str, Any]:
    return {
        "problem": problem,
        "hidden": problem.student_hidden.clone().requires_grad_(),
        "weight": Parameter(problem.student_weight.clone()),
        "target": dense_target(problem, 4),
        "shard": problem.shard(),
        "tp_group": None,
    }


def rows_of(loss: Callable[..., Any], problem: Problem) -> Tensor:
    """The active rows, as a caller that has the coefficients on the host finds them."""
    weighted = coefficients_of("forward_raw", problem) if loss is topk else problem.coefficients
    return (
        (weighted[:, 0] if loss is pointwise else weighted).reshape(len(weighted), -1).any(1).nonzero()[:, 0]
    )


def without_values(mode: FakeTensorMode, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as fake tensors."""

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    problem = arguments["problem"]
    tensors = {f.name: fake(getattr(problem, f.name)) for f in fields(problem)}
    rest = {name: fake(value) for name, value in arguments.items() if name not in ("problem", "target")}
    target = type(arguments["target"])(*map(fake, arguments["target"]))
    return rest | {"problem": replace(problem, **tensors), "target": target}


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_read(loss: Callable[..., Any]) -> None:
    problem = make_problem()
    mode = FakeTensorMode()
    arguments = without_values(mode, inputs(problem) | {"active": rows_of(loss, problem)})
    with mode:
        loss(**arguments, options=replace(TILES, check_values=False)).loss.backward()
    assert arguments["weight"].grad.shape == problem.student_weight.shape


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options, known", [(TILES, True), (replace(TILES, check_values=False), False)])
def test_checks_and_unknown_rows_read(loss: Callable[..., Any], options: TileOptions, known: bool) -> None:
    problem = make_problem()
    mode = FakeTensorMode()
    active = {"active": rows_of(loss, problem)} if known else {}
    arguments = without_values(mode, inputs(problem) | active)
    with mode, pytest.raises(READS):
        loss(**arguments, options=options)


@pytest.mark.parametrize("loss", LOSSES)
def test_known_rows_change_no_bit(loss: Callable[..., Any]) -> None:
    problem = make_problem()
    rows = rows_of(loss, problem)
    assert 0 < len(rows) < len(problem.labels)
    results = []
    for active in (None, rows):
        arguments = inputs(problem)
        output = loss(**arguments, options=TILES, active=active)
        output.loss.backward()
        stats = [value for value in output.stats if value is not None]
        gradients = [arguments["hidden"].grad, arguments["weight"].grad]
        results.append([output.loss.detach(), output.active, *stats, *gradients])
    assert all(map(torch.equal, *results))


def test_unchecked_labels_still_have_their_shape() -> None:
    problem = make_problem()
    unchecked = replace(TILES, check_values=False)
    wrong = replace(problem, labels=torch.full((19,), 117))
    linear_stats(*wrong.inputs(), shard=problem.shard(), options=unchecked)
    with pytest.raises(ValueError, match=r"labels lie in \[117, 117\]"):
        linear_stats(*wrong.inputs(), shard=problem.shard(), options=TILES)
    with pytest.raises(ValueError, match=r"labels is int32 of .*, wanted int64"):
        integers = replace(problem, labels=problem.labels.int())
        linear_stats(*integers.inputs(), shard=problem.shard(), options=unchecked)


@pytest.mark.parametrize("loss", LOSSES)
def test_active_rows_of_another_kind_are_refused(loss: Callable[..., Any]) -> None:
    arguments = inputs(make_problem())
    with pytest.raises(
        ValueError, match=r"active is bool of shape \(19,\) on cpu, wanted an int64 vector on cpu"
    ):
        loss(**arguments, options=TILES, active=torch.ones(19, dtype=torch.bool))
