"""The Triton kernels of pointwise divergences in Triton's interpreter; as ``test_interpreted``, and its tolerances."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from sead_kernels.split_kl import (
    BACKENDS,
    PointwiseRule,
    TileOptions,
    TokenStats,
    linear_pointwise_grads,
    linear_pointwise_stats,
)
from sead_kernels.split_kl.reference import dense_pointwise, dense_stats
from sead_kernels.split_kl.testing import (
    POINTWISE_RULES,
    LargestOutput,
    Problem,
    make_problem,
    relative_error,
    run_pointwise,
)
from sead_kernels.split_kl.triton import TritonBackend
from sead_kernels.split_kl.triton.tile_sizes import Tile
from torch import Tensor
from torch.nn import Parameter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's tile is 16 tokens x 32 vocabulary rows x 32 columns: ragged tails in every direction.
OPTIONS = TileOptions(backend="triton", tokens=18, vocab=72)

# Of gradients: (in the norm, of the largest entry).
GRADIENT_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.1e-3, 3.9e-3)}


class TestOutside:
    __test__ = not INTERPRETED

    @pytest.mark.slow
    @pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
    )
    def test_kernels_in_a_child_that_interprets(self) -> None:
        child = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert child.returncode == 0, child.stdout + child.stderr
        assert " passed" in child.stdout and "skipped" not in child.stdout, child.stdout


def problem_of(dtype: torch.dtype, **sizes: int) -> Problem:
    """Two steps of the GEMM's loop and a ragged tail, 2 token tiles, 4 vocabulary tiles."""
    return make_problem(dtype=dtype, **{"student_width": 40, "teacher_width": 72} | sizes)


def assert_close_gradient(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    in_norm, of_largest = GRADIENT_TOLERANCE[dtype]
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= in_norm, f"{error:.2e} of the norm"
    assert relative_error(actual, expected) <= of_largest


CASES = [(rule, torch.float32, 1 + index % 2) for index, rule in enumerate(POINTWISE_RULES)]
CASES += [(POINTWISE_RULES[1], torch.bfloat16, 1), (POINTWISE_RULES[7], torch.bfloat16, 4)]


class TestKernels:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(("rule", "dtype", "ranks"), CASES)
    def test_sums_and_gradients(self, rule: PointwiseRule, dtype: torch.dtype, ranks: int) -> None:
        problem, temperature = problem_of(dtype), 0.7
        exact = [tensor.double().requires_grad_() for tensor in problem.inputs()[:2]]
        teacher, settings = problem.inputs()[2:4], {"valid": problem.valid, "temperature": temperature}
        divergence = dense_pointwise(*exact, *teacher, rule, **settings)
        coefficients = problem.coefficients[:, 0].contiguous()
        expected = torch.autograd.grad((coefficients.double() * divergence).sum(), exact)
        stats = TokenStats(*(value.float() for value in dense_stats(*problem.inputs(), **settings)))
        shards = [problem.local(rank, ranks) for rank in range(ranks)]
        common = {"temperature": temperature, "options": OPTIONS}
        parts = [
            linear_pointwise_stats(*local.inputs()[:4], stats, rule, shard=shard, **common)
            for local, shard in shards
        ]
        sums = torch.stack(parts).sum(0)
        # Up to 20 nats here: a relative error.
        error = (sums[0] - divergence.detach()).abs() / divergence.detach().clamp(min=1)
        assert float(error.max()) <= 1e-5
        p, q = (
            (hidden.double() @ weight[: problem.valid].double().t() / temperature).softmax(1)
            for hidden, weight in (problem.inputs()[:2], problem.inputs()[2:4])
        )
        assert float((sums[2] - 1).abs().max()) <= 1e-5
        assert float((sums[3] - (p - q).abs().sum(1)).abs().max()) <= 1e-5
        dh, dw = torch.zeros_like(expected[0]), []
        for local, shard in shards:
            # A float32 target shows the sums before they are rounded to the weight's dtype.
            target = torch.zeros(local.student_weight.shape)
            partial, none = linear_pointwise_grads(
                *local.inputs()[:4], stats, sums[1] / sums[2], coefficients, rule,
                shard=shard, weight_grad=target, **common,
            )  # fmt: skip
            assert none is None and partial.dtype == torch.float32
            dh += partial
            dw.append(target)
        assert_close_gradient(dh, expected[0], dtype)
        assert_close_gradient(torch.cat(dw), expected[1], dtype)
        assert not torch.cat(dw)[problem.valid :].any()

    def test_a_whole_loss_allocates_no_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same numbers as the torch backend's. Few and large tiles: the interpreter's time goes with them."""
        monkeypatch.setitem(BACKENDS, "triton", TritonBackend(tile=Tile(64, 256, 32)))
        sizes = {"tokens": 40, "valid": 1000, "padded": 1008, "student_width": 4, "teacher_width": 4}
        problem, results = problem_of(torch.float32, **sizes), []
        for backend in ("triton", "torch"):
            options = TileOptions(backend=backend, tokens=8, vocab=512)
            weight = Parameter(problem.student_weight)
            hidden = problem.student_hidden.clone().requires_grad_()
            with LargestOutput() as largest:
                output = run_pointwise(problem, hidden, weight, POINTWISE_RULES[1], options=options)
                output.loss.backward()
            assert largest.numel < 40 * 1000 / 8
            results.append((output.loss.detach(), hidden.grad, weight.grad))
        for ours, expected in zip(*results, strict=True):
            assert ours is not None and expected is not None
            assert relative_error(ours, expected) <= 1e-5

    def test_nan_stays_nan(self) -> None:
        """Of one token, and of no other: a clip must not turn it into a number."""
        problem = problem_of(torch.float32)
        problem.student_hidden[4, 2] = float("nan")
        stats = TokenStats(*(value.float() for value in dense_stats(*problem.inputs(), valid=problem.valid)))
        pair = problem.inputs()[:4]
        for rule in (POINTWISE_RULES[0], POINTWISE_RULES[1], POINTWISE_RULES[9]):
            sums = linear_pointwise_stats(*pair, stats, rule, shard=problem.shard(), options=OPTIONS)
            for row in sums:
                assert row.isnan().nonzero()[:, 0].tolist() == [4], rule

    @pytest.mark.parametrize(("tokens", "valid"), [(0, 117), (19, 60)])
    def test_nothing_to_do(self, tokens: int, valid: int) -> None:
        """No token; or a last shard that is all padding."""
        problem = make_problem(tokens=tokens, valid=valid)
        local, shard = problem.local(3, 4)
        pair, stats = local.inputs()[:4], TokenStats(*torch.zeros(8, tokens))
        sums = linear_pointwise_stats(*pair, stats, POINTWISE_RULES[0], shard=shard, options=OPTIONS)
        assert sums.shape == (4, tokens) and not sums.any()
        rows = torch.zeros(tokens), torch.ones(tokens)
        dh, dw = linear_pointwise_grads(*pair, stats, *rows, POINTWISE_RULES[0], shard=shard, options=OPTIONS)
        assert dh.shape == local.student_hidden.shape and not dh.any()
        assert dw is not None and not dw.any()

    def test_rows_that_tma_cannot_read(self) -> None:
        problem = problem_of(torch.float32, teacher_width=6)
        stats = TokenStats(*torch.zeros(8, 19))
        with pytest.raises(ValueError, match=r"teacher_hidden of shape \(19, 6\) has rows of 24 bytes"):
            linear_pointwise_stats(
                *problem.inputs()[:4], stats, POINTWISE_RULES[0], shard=problem.shard(), options=OPTIONS
            )
        half = problem_of(torch.float16)
        with pytest.raises(ValueError, match=r"student_hidden is torch.float16, wanted bfloat16 or float32"):
            rows = torch.zeros(19), torch.ones(19)
            linear_pointwise_grads(
                *half.inputs()[:4], stats, *rows, POINTWISE_RULES[0], shard=half.shard(), options=OPTIONS
            )
