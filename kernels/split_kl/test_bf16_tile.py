"""Passes with a bf16 dz tile, as on tensor cores: the emulated CUDA kernels, and GEMMs of widened operands.

Rounding an entry to bf16 changes it by up to 2^-8; in the norm of these gradients that is 1.6e-3 to 2.1e-3,
whoever rounds. A GPU's GEMM of bf16 operands with float32 output is exact up to its order of summation, so
float32 GEMMs of the same bf16 values stand in for it.
"""

from __future__ import annotations

import pytest
import torch
from sead_kernels.split_kl import (
    finalize,
    gemm,
    gradient_loop,
    linear_pointwise_grads,
    linear_pointwise_stats,
    linear_split_kl_grads,
    linear_support_grads,
    tile_loop,
)
from sead_kernels.split_kl.reference import dense_gradients, dense_pointwise
from sead_kernels.split_kl.support import SupportGradient
from sead_kernels.split_kl.testing import (
    EMULATED,
    POINTWISE_RULES,
    Problem,
    make_problem,
    merged_state,
    small_tiles,
)
from torch import Tensor

TILES = small_tiles(EMULATED)


@pytest.fixture
def dz_tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Operands and dz stay bf16 as on CUDA; the dz tiles that reached a GEMM."""
    seen: list[Tensor] = []

    def operand_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if tensor.dtype == torch.bfloat16 else dtype

    def matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.mm(left.float(), right.float(), out=out)

    def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
        seen.append(left)
        total.addmm_(left.float(), right.float())

    monkeypatch.setattr(gemm, "operand_dtype", operand_dtype)
    monkeypatch.setattr(tile_loop, "operand_dtype", operand_dtype)
    for module in (tile_loop, gradient_loop):
        monkeypatch.setattr(module, "matmul", matmul)
    monkeypatch.setattr(gradient_loop, "accumulate", accumulate)
    return seen


def norm_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def wide_problem() -> Problem:
    return make_problem(tokens=19, valid=501, padded=512, dtype=torch.bfloat16)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_split_gradients(dz_tiles: list[Tensor], temperature: float) -> None:
    problem = wide_problem()
    stats = finalize(merged_state(problem, 1, temperature=temperature, options=TILES))
    sums = torch.zeros(512, 16)
    dh, _ = linear_split_kl_grads(
        *problem.inputs(), stats, problem.coefficients, shard=problem.shard(), temperature=temperature,
        options=TILES, weight_grad=sums,
    )  # fmt: skip
    expected_dh, expected_dw = dense_gradients(
        *problem.inputs(), problem.coefficients, valid=problem.valid, temperature=temperature
    )
    assert dz_tiles and all(tile.dtype == torch.bfloat16 for tile in dz_tiles)
    assert 5e-4 < norm_error(dh, expected_dh) <= 2.2e-3, "rounded once, and no more than once"
    assert 5e-4 < norm_error(sums, expected_dw) <= 2.2e-3


def test_pointwise_gradients(dz_tiles: list[Tensor]) -> None:
    problem, rule = wide_problem(), POINTWISE_RULES[1]
    stats = finalize(merged_state(problem, 1, options=TILES))
    pair, coefficients = problem.inputs()[:4], problem.coefficients[:, 0].contiguous()
    rows = linear_pointwise_stats(*pair, stats, rule, shard=problem.shard(), options=TILES)
    sums = torch.zeros(512, 16)
    dh, _ = linear_pointwise_grads(
        *pair, stats, rows[1] / rows[2], coefficients, rule, shard=problem.shard(), options=TILES,
        weight_grad=sums,
    )  # fmt: skip
    exact = pair[0].double().requires_grad_(), pair[1].double().requires_grad_()
    divergence = dense_pointwise(*exact, *pair[2:], rule, valid=problem.valid)
    expected_dh, expected_dw = torch.autograd.grad((coefficients.double() * divergence).sum(), exact)
    assert dz_tiles and all(tile.dtype == torch.bfloat16 for tile in dz_tiles)
    assert 5e-4 < norm_error(dh, expected_dh) <= 2.2e-3
    assert 5e-4 < norm_error(sums, expected_dw) <= 2.2e-3


def test_support_gradients(dz_tiles: list[Tensor]) -> None:
    problem = wide_problem()
    hidden, weight = problem.student_hidden.double(), problem.student_weight[:501].double()
    log_p = (hidden @ weight.t()).log_softmax(-1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(501, generator=generator)[:9] for _ in range(19)])
    offset, slope, values = (torch.randn(*shape, generator=generator) for shape in ((19,), (19,), (19, 9)))
    dz = log_p.exp() * (offset[:, None] + slope[:, None] * log_p)
    dz.scatter_(1, ids, values.double())
    lse = (hidden @ weight.t()).logsumexp(-1).float()
    sums = torch.zeros(512, 16)
    dh, _ = linear_support_grads(
        problem.student_hidden, problem.student_weight, SupportGradient(lse, offset, slope, ids, values),
        shard=problem.shard(), options=TILES, weight_grad=sums,
    )  # fmt: skip
    assert dz_tiles and all(tile.dtype == torch.bfloat16 for tile in dz_tiles)
    assert 5e-4 < norm_error(dh, dz @ weight) <= 2.2e-3
    assert 5e-4 < norm_error(sums[:501], dz.t() @ hidden) <= 2.2e-3
