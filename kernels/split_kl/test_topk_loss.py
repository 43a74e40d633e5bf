"""Every rule of the top-k losses against torch autograd of its published form, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    COEFFICIENTS,
    RULES,
    SUPPORTS,
    TileOptions,
    TopKStats,
    TopKTarget,
    finalize_entropy,
    linear_entropy,
    linear_support_grads,
    topk_loss,
    topk_stats_and_gradient,
)
from sead_kernels.split_kl.testing import (
    SMALL_TILES,
    coefficients_of,
    make_problem,
    merged_entropy,
    relative_error,
)
from sead_kernels.split_kl.topk import NO_ID
from sead_kernels.split_kl.topk_testing import (
    dense_target,
    expected_step,
    stats_and_gradient,
    student_pass,
    topk_step,
)
from torch import Tensor
from torch.nn import Parameter

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-5}


def assert_divergences(stats: TopKStats, terms: Tensor, rule: str, tolerance: float) -> None:
    """Absolute below 1 nat, relative above: a sum without weights is a hundred times larger than a divergence."""
    for column, name in enumerate(COEFFICIENTS[:2]):
        value = getattr(stats, name)
        assert (value is not None) == (name in RULES[rule].divergences)
        if value is not None:
            error = (value - terms[:, column]).abs() / terms[:, column].abs().clamp(min=1)
            assert float(error.max()) <= tolerance, name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients(rule: str, dtype: torch.dtype, ranks: int) -> None:
    check_values_and_gradients(SMALL_TILES, dtype, ranks, rule)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("rule", ["tail", "student_topk_policy"])
def test_backends(tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int, rule: str) -> None:
    """They compute what is common to all rules."""
    check_values_and_gradients(*tiles_and_dtype, ranks, rule)


def check_values_and_gradients(tiles: TileOptions, dtype: torch.dtype, ranks: int, rule: str) -> None:
    """Sampled tokens inside and outside the support; all terms."""
    problem, temperature = make_problem(dtype=dtype), 0.7
    target = dense_target(problem, 40, temperature)
    inside = (target.ids == problem.labels[:, None]).any(1)
    assert inside.any() and not inside.all()
    coefficients = coefficients_of(rule, problem)
    _, terms, dh, dw = expected_step(problem, target.ids, rule, coefficients, temperature)
    student = student_pass(problem, target, ranks, temperature, tiles)
    stats, gradient = topk_stats_and_gradient(student, target, problem.labels, coefficients, rule)
    assert_divergences(stats, terms, rule, TOLERANCE[dtype])
    total, shards = torch.zeros_like(dh), []
    for rank in range(ranks):
        local, shard = problem.local(rank, ranks)
        sums = torch.zeros(local.student_weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        partial, _ = linear_support_grads(
            local.student_hidden,
            local.student_weight,
            gradient,
            shard=shard,
            temperature=temperature,
            options=tiles,
            weight_grad=sums,
        )
        total += partial
        shards.append(sums)
    assert relative_error(total, dh) <= TOLERANCE[dtype]
    assert relative_error(torch.cat(shards), dw) <= TOLERANCE[dtype]


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rule", RULES)
def test_supports_with_empty_slots(rule: str, support: str) -> None:
    """Whatever the target says in an empty slot is not read; here it is NaN."""
    problem = make_problem()
    target = dense_target(problem, 12, support=support)
    empty = target.ids == NO_ID
    assert support in ("student", "teacher") or bool(empty.any(1).all())
    assert support != "intersection" or bool(empty.all(1).any()), "a row without any entry"
    loss, terms, dh, dw = expected_step(problem, target.ids, rule, coefficients_of(rule, problem))
    output, hidden_grad, weight_grad = topk_step(problem, target, rule)
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_divergences(output.stats, terms[output.active], rule, 1e-5)
    assert relative_error(hidden_grad, dh) <= 1e-5
    assert relative_error(weight_grad, dw) <= 1e-5


@pytest.mark.parametrize("topk", [1, 8, 64])
def test_sizes_of_the_support(topk: int) -> None:
    problem = make_problem()
    target = dense_target(problem, topk)
    for rule in RULES:
        loss, _, dh, dw = expected_step(problem, target.ids, rule, coefficients_of(rule, problem))
        output, hidden_grad, weight_grad = topk_step(problem, target, rule)
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        assert relative_error(hidden_grad, dh) <= 1e-5
        assert relative_error(weight_grad, dw) <= 1e-5


@pytest.mark.parametrize("support", SUPPORTS)
def test_ties_at_the_cut(tiles: TileOptions, support: str) -> None:
    """Small integers: equal logits at every cut of both models' lists, the smaller ids belong to them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"student_hidden": (19, 16), "student_weight": (128, 16), "teacher_hidden": (19, 24),
              "teacher_weight": (128, 24)}  # fmt: skip
    integers = {
        name: torch.randint(-1, 2, shape, generator=generator).float() for name, shape in shapes.items()
    }
    problem = replace(make_problem(), **integers)
    ids = merged_entropy(problem, 2, model="student", topk=8, options=tiles).topk_ids
    teacher = finalize_entropy(
        merged_entropy(problem, 2, topk=8, gather_ids=ids, options=tiles), problem.valid
    )
    target, wanted = TopKTarget.of(teacher, support, ids), dense_target(problem, 8, support=support)
    for ours, dense in zip(target.ids, wanted.ids, strict=True):
        assert set(ours.tolist()) - {NO_ID} == set(dense.tolist()) - {NO_ID}
    for rule in ("tail", "student_topk_policy"):
        loss, _, dh, dw = expected_step(problem, wanted.ids, rule, coefficients_of(rule, problem))
        output, hidden_grad, weight_grad = topk_step(problem, target, rule, tiles)
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        assert relative_error(hidden_grad, dh) <= 1e-5
        assert relative_error(weight_grad, dw) <= 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_autograd_node(rule: str) -> None:
    check_autograd_node(SMALL_TILES, rule)


def test_autograd_node_of_every_backend(tiles: TileOptions) -> None:
    check_autograd_node(tiles, "tail")


def check_autograd_node(tiles: TileOptions, rule: str) -> None:
    """Value, factor grad_output, dropped rows; a main_grad is added to."""
    problem = make_problem()
    target = dense_target(problem, 8)
    coefficients = coefficients_of(rule, problem)
    loss, _, dh, dw = expected_step(problem, target.ids, rule, coefficients)
    for main_grad in (None, torch.full(problem.student_weight.shape, 3.0)):
        weight, hidden = (
            Parameter(problem.student_weight.clone()),
            problem.student_hidden.clone().requires_grad_(),
        )
        if main_grad is not None:
            vars(weight).update(main_grad=main_grad, grad_added_to_main_grad=False)
        output = topk_loss(
            hidden, weight, target, problem.labels, coefficients, rule=rule, shard=problem.shard(),
            tp_group=None, options=tiles,
        )  # fmt: skip
        (output.loss * 0.37).backward()
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        assert output.active.tolist() == [t for t in range(19) if t % 3]
        assert hidden.grad is not None and weight.grad is not None and not hidden.grad[::3].any()
        assert relative_error(hidden.grad, dh * 0.37) <= 1e-5
        weight_grad = weight.grad if main_grad is None else main_grad - 3
        assert relative_error(weight_grad, dw * 0.37) <= 1e-5


def test_strided_support(tiles: TileOptions) -> None:
    """The kernels read ids and values by row: transposed tensors must not reach them as they are."""
    problem = make_problem()
    _, gradient = stats_and_gradient(problem, dense_target(problem, 8))
    strided = replace(
        gradient, ids=gradient.ids.t().contiguous().t(), values=gradient.values.t().contiguous().t()
    )
    inputs = (problem.student_hidden, problem.student_weight)
    expected = linear_support_grads(*inputs, gradient, shard=problem.shard(), options=tiles)
    actual = linear_support_grads(*inputs, strided, shard=problem.shard(), options=tiles)
    assert torch.equal(actual[0], expected[0])
    assert actual[1] is not None and expected[1] is not None and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("rule", RULES)
def test_nothing_active(rule: str) -> None:
    problem = make_problem()
    output, hidden_grad, weight_grad = topk_step(
        problem, dense_target(problem, 4), rule, coefficients=torch.zeros(19, 4)
    )
    assert output.loss.item() == 0 and not hidden_grad.any() and not weight_grad.any()
    assert output.active.shape == (0,) and output.stats.teacher_tail.shape == (0,)


def test_wrong_arguments() -> None:
    problem = make_problem()
    target = dense_target(problem, 4)
    with pytest.raises(ValueError, match=r"support_logprobs has shape \(19, 4\) .*wanted \(19, 5\)"):
        topk_stats_and_gradient(
            student_pass(problem, target), dense_target(problem, 5), problem.labels, problem.coefficients, "tail"
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"gather_ids is int32 of shape \(19, 4\) .*, wanted int64"):
        linear_entropy(
            problem.student_hidden, problem.student_weight, problem.labels, shard=problem.shard(),
            gather_ids=target.ids.int(),
        )  # fmt: skip
    _, gradient = stats_and_gradient(problem, target)
    with pytest.raises(ValueError, match=r"gradient.slope is .*\(3,\), wanted shape \(19,\)"):
        wrong = replace(gradient, slope=torch.zeros(3))
        linear_support_grads(problem.student_hidden, problem.student_weight, wrong, shard=problem.shard())
    with pytest.raises(ValueError, match=r"gradient.values has shape \(19, 1\), wanted \(19, 5\)"):
        wrong = replace(gradient, values=torch.zeros(19, 1))
        linear_support_grads(problem.student_hidden, problem.student_weight, wrong, shard=problem.shard())
    for wrong_id in (-1, 117):
        ids = target.ids.clone()
        ids[4, 2] = wrong_id
        with pytest.raises(ValueError, match=rf"target.ids lie in \[.*{wrong_id}.*\], wanted \[0, 117\)"):
            topk_step(problem, target._replace(ids=ids), "tail")
    repeated = target.ids.clone()
    repeated[4, 2] = repeated[4, 0]
    with pytest.raises(ValueError, match=r"target\.ids has a repeated id in a row, wanted distinct ones"):
        topk_step(problem, target._replace(ids=repeated), "tail")
    with pytest.raises(ValueError, match=r"target.ids has shape \(18, 4\), wanted 19 rows"):
        topk_step(problem, target._replace(ids=target.ids[1:]), "tail")


def test_wrong_rule() -> None:
    problem = make_problem()
    target = dense_target(problem, 4)
    with pytest.raises(ValueError, match=r"rule is 'forward', wanted one of tail, forward_teacher_norm, "):
        topk_step(problem, target, "forward", coefficients=problem.coefficients)
    for rule, other, own in (
        ("forward_raw", "reverse_kl", "forward_kl"),
        ("reverse_both_norm", "forward_kl", "reverse_kl"),
    ):
        with pytest.raises(
            ValueError, match=rf"a non-zero {other}, wanted 0: rule '{rule}' defines {own} only"
        ):
            topk_step(problem, target, rule, coefficients=problem.coefficients)
