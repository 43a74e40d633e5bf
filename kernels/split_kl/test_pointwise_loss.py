"""The pointwise loss as an autograd node: what ``split_kl_loss`` promises, and what it shares with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sead_kernels.split_kl import (
    LogitCache,
    PointwiseRule,
    TileOptions,
    pointwise_loss,
    split_kl_loss,
    tile_loop,
)
from sead_kernels.split_kl.reference import dense_pointwise, dense_stats
from sead_kernels.split_kl.testing import (
    POINTWISE_RULES,
    SMALL_TILES,
    Problem,
    make_problem,
    relative_error,
    run_pointwise,
)
from torch import Tensor
from torch.nn import Parameter

CLIPPED_JSD = POINTWISE_RULES[1]


def leaves(problem: Problem) -> tuple[Tensor, Parameter]:
    return problem.student_hidden.clone().requires_grad_(), Parameter(problem.student_weight.clone())


def gradients(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_autograd_node(tiles_and_dtype: tuple[TileOptions, torch.dtype], temperature: float) -> None:
    """Value, both gradients, the factor grad_output, and statistics of the active rows (two of three)."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    hidden, weight = leaves(problem)
    output = run_pointwise(problem, hidden, weight, CLIPPED_JSD, temperature=temperature, options=tiles)
    (output.loss * 0.37).backward()
    exact = problem.student_hidden.double(), problem.student_weight.double()
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in exact)
    teacher, settings = problem.inputs()[2:4], {"valid": problem.valid, "temperature": temperature}
    divergence = dense_pointwise(*inputs, *teacher, CLIPPED_JSD, **settings)
    loss = (problem.coefficients[:, 0].double() * divergence).sum()
    expected_dh, expected_dw = torch.autograd.grad(loss * 0.37, inputs)
    # 0.37 in float32 has a relative error of 3e-8; gradients for bf16 inputs are bf16, half an ulp.
    tolerance = {torch.float32: 1e-5, torch.float64: 2e-7, torch.bfloat16: 4e-3}[dtype]
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    dh, dw = gradients(hidden, weight)
    assert dh.dtype == dw.dtype == dtype
    assert output.loss.item() == pytest.approx(loss.item(), rel=limit)
    assert relative_error(dh, expected_dh) <= tolerance and relative_error(dw, expected_dw) <= tolerance
    assert output.active.tolist() == [t for t in range(19) if t % 3]
    assert not dh[::3].any() and not dw[problem.valid :].any()
    stats = output.stats
    assert float((stats.divergence - divergence.detach()[output.active]).abs().max()) <= limit
    for name, value in dense_stats(*problem.inputs(), **settings)._asdict().items():
        assert float((getattr(stats, name) - value[output.active]).abs().max()) <= limit, name
    assert not stats.divergence.requires_grad and not stats.gap.requires_grad


@pytest.mark.parametrize(("kind", "column"), [("forward", 0), ("reverse", 1)])
def test_without_a_clip_it_is_the_split_kl_loss(kind: str, column: int, tiles: TileOptions) -> None:
    problem = make_problem()
    hidden, weight = leaves(problem)
    run_pointwise(
        problem, hidden, weight, PointwiseRule(kind), temperature=0.7, options=tiles
    ).loss.backward()
    coefficients = torch.zeros_like(problem.coefficients)
    coefficients[:, column] = problem.coefficients[:, 0]
    other_hidden, other_weight = leaves(problem)
    settings = {"shard": problem.shard(), "tp_group": None, "temperature": 0.7, "options": tiles}
    split_kl_loss(
        other_hidden, other_weight, *problem.inputs()[2:], coefficients, **settings
    ).loss.backward()  # fmt: skip
    for ours, expected in zip(gradients(hidden, weight), gradients(other_hidden, other_weight), strict=True):
        assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("rule", [PointwiseRule("reverse"), PointwiseRule("skew_reverse", 0.1)])
def test_logit_gradients_sum_to_zero(rule: PointwiseRule, tiles: TileOptions) -> None:
    """Logits near 60, whose log-sum-exp is rounded by 2e-6: without the mass that times the mean is left over."""
    problem = make_problem()
    problem.student_hidden[:, 0] = 1
    problem.student_weight[: problem.valid, 0] = 60
    hidden, weight = leaves(problem)
    run_pointwise(problem, hidden, weight, rule, options=tiles).loss.backward()
    _, dw = gradients(hidden, weight)
    assert float(dw.sum(0).abs().max() / dw.abs().sum(0).max()) <= 1e-6


def test_labels_of_dropped_rows_may_hold_anything() -> None:
    problem = make_problem()
    expected = run_pointwise(problem, *leaves(problem), CLIPPED_JSD).loss.item()
    problem.labels[::3] = -100
    assert run_pointwise(problem, *leaves(problem), CLIPPED_JSD).loss.item() == expected


def test_two_runs_are_bitwise_equal(tiles: TileOptions) -> None:
    results = []
    for _ in range(2):
        problem = make_problem()
        hidden, weight = leaves(problem)
        run_pointwise(problem, hidden, weight, CLIPPED_JSD, options=tiles).loss.backward()
        results.append(gradients(hidden, weight))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("with_main_grad", [False, True])
def test_nothing_active_is_a_zero_with_a_backward_pass(
    tiles: TileOptions, tokens: int, with_main_grad: bool
) -> None:
    problem = make_problem(tokens=tokens)
    problem.coefficients.zero_()
    hidden, weight = leaves(problem)
    if with_main_grad:
        vars(weight).update(main_grad=torch.full(weight.shape, 3.0), grad_added_to_main_grad=False)
    output = run_pointwise(problem, hidden, weight, CLIPPED_JSD, options=tiles)
    assert output.loss.item() == 0.0 and output.active.numel() == 0 and output.stats.gap.shape == (0,)
    output.loss.backward()
    dh, dw = gradients(hidden, weight)
    assert dh.shape == (tokens, 16) and not dh.any() and dw.shape == weight.shape
    if with_main_grad:
        attributes = vars(weight)
        assert attributes["grad_added_to_main_grad"] and bool((attributes["main_grad"] == 3.0).all())
    else:
        assert not dw.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_main_grad_is_added_to(tiles: TileOptions, dtype: torch.dtype, tied: bool) -> None:
    """In its own float32; rows of padding keep what they hold; a tied weight gets no gradient from autograd."""
    problem = make_problem(dtype=dtype)
    hidden, weight = leaves(problem)
    earlier = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    main_grad = earlier.clone()
    vars(weight).update(main_grad=main_grad, grad_added_to_main_grad=False)
    run_pointwise(problem, hidden, weight, CLIPPED_JSD, options=tiles, weight_tied=tied).loss.backward()
    exact = problem.student_weight.double().requires_grad_()
    inputs = problem.student_hidden, exact, *problem.inputs()[2:4]
    divergence = dense_pointwise(*inputs, CLIPPED_JSD, valid=problem.valid)
    (expected,) = torch.autograd.grad((problem.coefficients[:, 0].double() * divergence).sum(), exact)
    assert relative_error(main_grad - earlier, expected) <= 1e-5
    assert torch.equal(main_grad[problem.valid :], earlier[problem.valid :])
    assert (weight.grad is None) == tied
    assert vars(weight)["grad_added_to_main_grad"] == (not tied)


def test_frozen_weight_and_frozen_hidden() -> None:
    problem = make_problem()
    hidden, weight = leaves(problem)
    run_pointwise(problem, hidden, weight.requires_grad_(False), CLIPPED_JSD).loss.backward()
    assert weight.grad is None and hidden.grad is not None and bool(hidden.grad.any())
    hidden, weight = leaves(problem)
    run_pointwise(problem, hidden.requires_grad_(False), weight, CLIPPED_JSD).loss.backward()
    assert hidden.grad is None and weight.grad is not None and bool(weight.grad.any())


def test_kept_logits_change_no_bit_and_save_four_gemms_of_eight(
    tiles: TileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pass 1 fills the cache, the sweep between the passes leaves it, pass 2 empties it."""
    counted: list[int] = []
    original = tile_loop.matmul

    def count(left: Tensor, right: Tensor, out: Tensor) -> None:
        counted.append(out.numel() * left.shape[1])
        original(left, right, out)

    monkeypatch.setattr(tile_loop, "matmul", count)
    problem = make_problem(valid=2901, padded=2944)
    results, logits = [], []
    for cache_mib in (0, 1):
        counted.clear()
        hidden, weight = leaves(problem)
        options = replace(tiles, tokens=7, vocab=1000, cache_mib=cache_mib)
        run_pointwise(problem, hidden, weight, CLIPPED_JSD, options=options).loss.backward()
        results.append(gradients(hidden, weight))
        logits.append(sum(counted))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    # 12 active rows, widths 16 and 24, three sweeps.
    assert logits[0] == 3 * 12 * 2901 * (16 + 24)
    assert logits[1] == (logits[0] if tiles.backend == "torch" else logits[0] // 3)


def test_a_cache_knows_places() -> None:
    cache = LogitCache(1)
    where = slice(0, 10), slice(0, 3)
    tiles = cache.reserve(*where, torch.float32, torch.device("cpu"))
    assert cache.look(*where) is tiles and cache.look(slice(0, 9), slice(0, 3)) is None
    assert cache.take(*where) is tiles and cache.look(*where) is None


def test_wrong_calls() -> None:
    problem = make_problem()
    good: dict[str, Any] = {"shard": problem.shard(), "tp_group": None, "options": SMALL_TILES}
    column = problem.coefficients[:, 0].contiguous()
    with pytest.raises(
        ValueError, match=r"coefficients is float32 of shape \(19, 4\), wanted .* shape \(19,\)$"
    ):
        pointwise_loss(*problem.inputs(), problem.coefficients, CLIPPED_JSD, **good)
    with pytest.raises(ValueError, match=r"coefficients is int64 of shape \(19,\), wanted float32 of shape"):
        pointwise_loss(*problem.inputs(), column.long(), CLIPPED_JSD, **good)
    for name in ("teacher_hidden", "labels"):
        short = replace(problem, **{name: getattr(problem, name)[1:]})
        with pytest.raises(ValueError, match=rf"{name} .*\(18,.*\), wanted 19 rows"):
            pointwise_loss(*short.inputs(), column, CLIPPED_JSD, **good)
    local, shard = problem.local(1, 2)
    message = r"student_weight has rows 64 to 128 of 117 \(shard.valid\), wanted all .* as tp_group"
    with pytest.raises(ValueError, match=message):
        pointwise_loss(*local.inputs(), column, CLIPPED_JSD, **good | {"shard": shard})
    labels = problem.labels.clone()
    labels[1] = 117
    with pytest.raises(ValueError, match=r"labels lie in \[.*117\], wanted \[0, 117\)"):
        pointwise_loss(*replace(problem, labels=labels).inputs(), column, CLIPPED_JSD, **good)
    hidden, weight = leaves(problem)
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph"):
        loss = run_pointwise(problem, hidden, weight, CLIPPED_JSD).loss
        torch.autograd.grad(loss, hidden, create_graph=True)
