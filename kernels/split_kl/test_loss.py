"""Pass 2 and the autograd node against the dense oracle, and Megatron's protocol for weight gradients.

Tolerances, relative to the largest entry: float32 GEMMs over 16 to 128 terms carry about 5e-7, and p (ln p -
ln q) multiplies it by the logarithms' size, about 10; 1e-5 is used, also for float32 sums from bf16 inputs.
float64: 1e-12. Gradients that autograd hands over for bf16 inputs are bf16, half an ulp 2^-8 = 4e-3 of the entry.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    SplitKLOutput,
    TileOptions,
    VocabShard,
    finalize,
    linear_split_kl_grads,
    split_kl_loss,
)
from sead_kernels.split_kl.reference import dense_gradients, dense_loss, dense_stats
from sead_kernels.split_kl.testing import SMALL_TILES, Problem, make_problem, merged_state, relative_error
from torch import Tensor
from torch.nn import Parameter

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}


def run(
    problem: Problem,
    weight: Tensor,
    hidden: Tensor,
    *,
    temperature: float = 1.0,
    tied: bool = False,
    tiles: TileOptions = SMALL_TILES,
) -> SplitKLOutput:
    return split_kl_loss(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        problem.coefficients,
        shard=problem.shard(),
        tp_group=None,
        temperature=temperature,
        options=tiles,
        weight_tied=tied,
    )


def leaves(problem: Problem) -> tuple[Parameter, Tensor]:
    return Parameter(problem.student_weight.clone()), problem.student_hidden.clone().requires_grad_()


@pytest.mark.parametrize("column", [0, 1, 2, 3, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_oracle_agrees_with_autograd(column: int | None, temperature: float) -> None:
    """Each term alone and all together: the oracle of the other tests is itself only formulas."""
    problem = make_problem(dtype=torch.float64)
    coefficients = problem.coefficients.double()
    if column is not None:
        coefficients = torch.zeros_like(coefficients).index_fill_(1, torch.tensor([column]), 1.3)
    weight, hidden = leaves(problem)
    inputs = (hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels)
    loss = dense_loss(*inputs, coefficients, valid=problem.valid, temperature=temperature)
    loss.backward()
    dh, dw = dense_gradients(*problem.inputs(), coefficients, valid=problem.valid, temperature=temperature)
    torch.testing.assert_close(hidden.grad, dh, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, dw, rtol=1e-12, atol=1e-12)
    stats = dense_stats(*problem.inputs(), valid=problem.valid, temperature=temperature)
    terms = torch.stack([stats.forward_kl, stats.reverse_kl, stats.student_entropy, stats.student_logprob], 1)
    torch.testing.assert_close(loss.detach(), (coefficients * terms).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_match_the_oracle(
    tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int, temperature: float
) -> None:
    """Partial dh summed over ranks, dW of every shard."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    stats = finalize(merged_state(problem, ranks, temperature=temperature, options=tiles))
    expected_dh, expected_dw = dense_gradients(
        *problem.inputs(), problem.coefficients, valid=problem.valid, temperature=temperature
    )
    dh = torch.zeros_like(expected_dh)
    shards = []
    for rank in range(ranks):
        local, shard = problem.local(rank, ranks)
        # A float32 target shows the sums themselves, before any rounding to the weight's dtype.
        target = torch.zeros(local.student_weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        partial, none = linear_split_kl_grads(
            *local.inputs(),
            stats,
            local.coefficients,
            shard=shard,
            temperature=temperature,
            options=tiles,
            weight_grad=target,
        )
        assert none is None and partial.dtype == target.dtype
        dh += partial
        shards.append(target)
    dw = torch.cat(shards)
    assert relative_error(dh, expected_dh) <= TOLERANCE[dtype]
    assert relative_error(dw, expected_dw) <= TOLERANCE[dtype]
    assert not dw[problem.valid :].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_autograd_node(tiles_and_dtype: tuple[TileOptions, torch.dtype], temperature: float) -> None:
    """Value, both gradients, the factor grad_output, and statistics of the active rows (two of three)."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    weight, hidden = leaves(problem)
    output = run(problem, weight, hidden, temperature=temperature, tiles=tiles)
    (output.loss * 0.37).backward()
    inputs, valid = problem.inputs(), problem.valid
    expected = dense_loss(*inputs, problem.coefficients, valid=valid, temperature=temperature)
    expected_dh, expected_dw = dense_gradients(
        *inputs, problem.coefficients * 0.37, valid=valid, temperature=temperature
    )
    # 0.37 in float32 has a relative error of 3e-8: it meets the float64 gradients through the coefficients'
    # dtype.
    tolerance = {torch.float32: 1e-5, torch.float64: 2e-7, torch.bfloat16: 4e-3}[dtype]
    assert output.loss.item() == pytest.approx(float(expected), rel=TOLERANCE[dtype])
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert relative_error(hidden.grad, expected_dh) <= tolerance
    assert relative_error(weight.grad, expected_dw) <= tolerance
    assert output.active.tolist() == [t for t in range(19) if t % 3]
    assert not hidden.grad[::3].any()
    dense = dense_stats(*inputs, valid=valid, temperature=temperature)
    assert float((output.stats.reverse_kl - dense.reverse_kl[output.active]).abs().max()) <= TOLERANCE[dtype]
    assert not output.stats.reverse_kl.requires_grad


def test_labels_of_dropped_rows_may_hold_anything() -> None:
    problem = make_problem()
    problem.labels[::3] = -100
    output = run(problem, *leaves(problem))
    assert output.loss.item() == run(make_problem(), *leaves(problem)).loss.item()


def test_two_runs_are_bitwise_equal(tiles: TileOptions) -> None:
    gradients = []
    for _ in range(2):
        problem = make_problem()
        weight, hidden = leaves(problem)
        run(problem, weight, hidden, tiles=tiles).loss.backward()
        assert weight.grad is not None and hidden.grad is not None
        gradients.append((weight.grad, hidden.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("with_main_grad", [False, True])
def test_nothing_active_is_a_zero_with_a_backward_pass(
    tiles: TileOptions, tokens: int, with_main_grad: bool
) -> None:
    problem = make_problem(tokens=tokens)
    problem.coefficients.zero_()
    weight, hidden = leaves(problem)
    fired = []
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad.shape))
    if with_main_grad:
        vars(weight).update(main_grad=torch.full(weight.shape, 3.0), grad_added_to_main_grad=False)
    output = run(problem, weight, hidden, tiles=tiles)
    assert output.loss.item() == 0.0 and output.active.numel() == 0 and output.stats.forward_kl.shape == (0,)
    output.loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == (tokens, 16) and not hidden.grad.any()
    assert fired == [weight.shape]
    if with_main_grad:
        attributes = vars(weight)
        assert attributes["grad_added_to_main_grad"] and bool((attributes["main_grad"] == 3.0).all())
    else:
        assert weight.grad is not None and not weight.grad.any()


def test_no_token_gives_a_zero_weight_gradient(tiles: TileOptions) -> None:
    """The weight's gradient starts as uninitialised memory, which is NaN here, and no tile overwrites it."""
    problem = make_problem(tokens=0)
    stats = finalize(merged_state(problem, 1, options=tiles))
    torch.use_deterministic_algorithms(True)
    try:
        dh, dw = linear_split_kl_grads(
            *problem.inputs(), stats, problem.coefficients, shard=problem.shard(), options=tiles
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert dh.shape == (0, 16) and dw is not None and bool((dw == 0).all())


def test_frozen_weight_and_frozen_hidden() -> None:
    problem = make_problem()
    _, expected_dw = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    weight, hidden = leaves(problem)
    run(problem, weight.requires_grad_(False), hidden).loss.backward()
    assert weight.grad is None and hidden.grad is not None and bool(hidden.grad.any())
    weight, hidden = leaves(problem)
    run(problem, weight, hidden.requires_grad_(False)).loss.backward()
    assert (
        hidden.grad is None and weight.grad is not None and relative_error(weight.grad, expected_dw) <= 1e-5
    )


def test_one_padded_rank_has_no_gradient() -> None:
    problem = make_problem(valid=60)
    stats = finalize(merged_state(problem, 4))
    local, shard = problem.local(3, 4)
    dh, dw = linear_split_kl_grads(
        *local.inputs(), stats, local.coefficients, shard=shard, options=SMALL_TILES
    )
    assert shard == VocabShard(96, 60) and dw is not None and not dh.any() and not dw.any()


def test_float64_gradcheck_through_the_node() -> None:
    """Finite differences know nothing of the formulas."""
    problem = replace(
        make_problem(tokens=4, valid=13, padded=16, student_width=3, teacher_width=2, dtype=torch.float64)
    )
    weight, hidden = leaves(problem)
    assert torch.autograd.gradcheck(lambda h, w: run(problem, w, h, temperature=0.8).loss, (hidden, weight))
