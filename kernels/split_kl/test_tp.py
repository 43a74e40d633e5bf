"""Tensor parallelism over real process groups (gloo): same bits on all ranks, same numbers as one rank.

The limit is the 1e-5 of float32 in test_stats.py: shards only add merges. Bits are compared because zones are
drawn from the statistics, and ranks that drew different zones would disagree about the active rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from sead_kernels.split_kl import RULES, TileOptions, finalize
from sead_kernels.split_kl.reference import (
    dense_gradients,
    dense_loss,
    dense_pointwise,
    dense_stats,
    dense_topk_entropy,
    dense_topk_loss,
)
from sead_kernels.split_kl.testing import (
    TENSOR_PARALLEL_RULE,
    coefficients_of,
    make_problem,
    relative_error,
    tensor_parallel_rank,
)
from torch import Tensor


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_bitwise_and_with_the_oracle(ranks: int, tiles: TileOptions, tmp_path: Path) -> None:
    multiprocessing.spawn(tensor_parallel_rank, args=(ranks, str(tmp_path), tiles.backend), nprocs=ranks)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    shared: dict[str, Tensor] = results[0]["shared"]
    for result in results[1:]:
        for name, value in shared.items():
            assert torch.equal(value, result["shared"][name]), name
    problem = make_problem()
    expected = dense_stats(*problem.inputs(), valid=problem.valid)
    for name, value in finalize(shared["state"])._asdict().items():
        assert float((value - getattr(expected, name)).abs().max()) <= 1e-5, name
    for topk in (0, 40):
        assert float((shared[f"{topk}.entropy"] - expected.teacher_entropy).abs().max()) <= 1e-5
    topk_entropy, _ = dense_topk_entropy(
        problem.teacher_hidden, problem.teacher_weight, 40, valid=problem.valid
    )
    assert float((shared["40.topk_entropy"] - topk_entropy).abs().max()) <= 1e-5
    loss = dense_loss(*problem.inputs(), problem.coefficients, valid=problem.valid)
    assert shared["loss"].item() == pytest.approx(float(loss), rel=1e-5)
    dh, dw = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    gradients = [result["gradients"] for result in results]
    assert_gradients([part["exact"] for part in gradients], dh, dw)
    for rule in RULES:
        hidden = problem.student_hidden.double().requires_grad_()
        weight = problem.student_weight.double().requires_grad_()
        inputs = (hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels)
        coefficients = coefficients_of(rule, problem)
        loss, _ = dense_topk_loss(*inputs, coefficients, shared["ids"], rule, valid=problem.valid)
        loss.backward()
        assert shared[f"{rule}.loss"].item() == pytest.approx(float(loss.detach()), rel=1e-5), rule
        assert hidden.grad is not None and weight.grad is not None
        assert_gradients([part[rule] for part in gradients], hidden.grad, weight.grad)

    leaves = (
        problem.student_hidden.double().requires_grad_(),
        problem.student_weight.double().requires_grad_(),
    )
    divergence = dense_pointwise(
        *leaves, problem.teacher_hidden, problem.teacher_weight, TENSOR_PARALLEL_RULE, valid=problem.valid
    )
    loss = (problem.coefficients[:, 0].double() * divergence).sum()
    assert_gradients([part["pointwise"] for part in gradients], *torch.autograd.grad(loss, leaves))
    assert shared["pointwise.loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    error = shared["pointwise.divergence"] - divergence.detach()[shared["active"]]
    assert float(error.abs().max()) <= 1e-5


def assert_gradients(parts: list[tuple[Tensor, Tensor]], dh: Tensor, dw: Tensor) -> None:
    assert relative_error(torch.stack([part[0] for part in parts]).sum(0), dh) <= 1e-5
    assert relative_error(torch.cat([part[1] for part in parts]), dw) <= 1e-5
