"""The kernels' numbers against the dense float64 oracle, through Triton's interpreter.

Triton decides when it is imported whether to interpret. Other tests must not see that, so a child process runs
this file with TRITON_INTERPRET=1; there, ``TestKernels`` is collected.

Tolerances: those of test_stats.py and test_loss.py; statistics from bf16 inputs are those of float32, since
products of bf16 are exact in it. dz from bf16 inputs is rounded to bf16, by up to 2^-8 = 3.9e-3 of an entry: the
float64 oracle's dz, rounded, gives gradients that are off by 2.06e-3 in the norm and 3.2e-3 of the largest entry here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    BACKENDS,
    TileOptions,
    VocabShard,
    finalize,
    linear_entropy,
    linear_split_kl_grads,
    linear_stats,
)
from sead_kernels.split_kl.api import linear_support_grads
from sead_kernels.split_kl.entropy_state import EntropyState
from sead_kernels.split_kl.reference import dense_gradients, dense_stats
from sead_kernels.split_kl.state import SENTINEL, TokenStats, empty_state
from sead_kernels.split_kl.support import SupportGradient
from sead_kernels.split_kl.testing import (
    LargestOutput,
    Problem,
    make_problem,
    merged_entropy,
    merged_state,
    relative_error,
)
from sead_kernels.split_kl.topk import NO_ID
from sead_kernels.split_kl.topk_testing import topk_loss_on_own_topk
from sead_kernels.split_kl.triton import TritonBackend
from sead_kernels.split_kl.triton.tile_sizes import Tile
from torch import Tensor
from torch.nn import Parameter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32 = torch.float32

# The interpreter's tile is 16 tokens x 32 vocabulary rows x 32 columns: ragged tails in every direction.
OPTIONS = TileOptions(backend="triton", tokens=18, vocab=72)

# Of gradients: (in the norm, of the largest entry).
GRADIENT_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.1e-3, 3.9e-3)}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
)


class TestOutside:
    """What can be said without a kernel, in a process that does not interpret."""

    __test__ = not INTERPRETED

    @needs_triton
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

    def test_the_package_imports_without_triton(self) -> None:
        code = (
            "import sys, torch; sys.modules['triton'] = None\n"
            "from sead_kernels.split_kl.triton import TritonBackend\n"
            "print(TritonBackend().unavailable(torch.device('cpu'), torch.float32))"
        )
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        assert "pip install triton" in child.stdout

    @needs_triton
    @pytest.mark.parametrize(
        ("capability", "sentence"),
        [
            ((8, 0), "it needs a Hopper GPU or newer (TMA)"),
            ((9, 0), None),
            ((10, 3), None),
            ((12, 0), "sm_120"),
        ],
    )
    def test_reasons_for_not_being_available(
        self, capability: tuple[int, int], sentence: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = TritonBackend()
        assert "backend 'torch'" in str(backend.unavailable(torch.device("cuda"), torch.float64))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "not on cpu" in str(backend.unavailable(torch.device("cpu"), FLOAT32))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no GPU is visible" in str(backend.unavailable(torch.device("cuda"), FLOAT32))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "NVIDIA" in str(backend.unavailable(torch.device("cuda"), FLOAT32))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        reason = backend.unavailable(torch.device("cuda"), FLOAT32)
        assert reason is None if sentence is None else sentence in str(reason)

    @needs_triton
    @pytest.mark.parametrize(
        ("token_tiles", "vocab_tiles", "splits"), [(128, 1002, 11), (8, 1002, 16), (1, 4, 4), (500, 1, 1)]
    )
    def test_splits_keep_the_processors_busy(self, token_tiles: int, vocab_tiles: int, splits: int) -> None:
        """132 processors: 8 token tiles x 16 splits are one round of 128 programs, 17 splits would be two."""
        from sead_kernels.split_kl.triton.launch import tiles_per_split

        per_split = tiles_per_split(token_tiles, vocab_tiles, 132)
        assert -(-vocab_tiles // per_split) == splits


def problem_of(dtype: torch.dtype, **sizes: int) -> Problem:
    """Two steps of the GEMM's loop and a ragged tail, 2 token tiles, 4 vocabulary tiles."""
    return make_problem(dtype=dtype, **{"student_width": 40, "teacher_width": 72} | sizes)


def assert_close_gradient(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    in_norm, of_largest = GRADIENT_TOLERANCE[dtype]
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= in_norm, f"{error:.2e} of the norm"
    assert relative_error(actual, expected) <= of_largest


def assert_close_stats(actual: TokenStats, expected: TokenStats) -> None:
    for name, value in actual._asdict().items():
        error = float((value - getattr(expected, name)).abs().max())
        assert error <= 1e-5, f"{name}: {error:.2e}"


def merged_teacher(problem: Problem, ranks: int, topk: int, gather_ids: Tensor | None = None) -> EntropyState:
    return merged_entropy(problem, ranks, temperature=0.7, topk=topk, gather_ids=gather_ids, options=OPTIONS)


def teacher_logits(problem: Problem) -> Tensor:
    """float64 [T, valid] at temperature 0.7."""
    return problem.teacher_hidden.double() @ problem.teacher_weight[: problem.valid].double().t() / 0.7


class TestKernels:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_statistics(self, dtype: torch.dtype, ranks: int, temperature: float) -> None:
        problem = problem_of(dtype)
        stats = finalize(merged_state(problem, ranks, temperature=temperature, options=OPTIONS))
        assert_close_stats(
            stats, dense_stats(*problem.inputs(), valid=problem.valid, temperature=temperature)
        )

    def test_statistics_of_an_odd_number_of_splits(self) -> None:
        """One token tile, three vocabulary tiles: as many splits, merged two and one."""
        problem = problem_of(FLOAT32, tokens=13, valid=90)
        stats = finalize(merged_state(problem, 1, options=OPTIONS))
        assert_close_stats(stats, dense_stats(*problem.inputs(), valid=problem.valid))

    def test_sampled_logits_are_zero_where_another_shard_has_them(self) -> None:
        problem = problem_of(FLOAT32)
        for rank in range(4):
            local, shard = problem.local(rank, 4)
            state = linear_stats(*local.inputs(), shard=shard, options=OPTIONS)
            is_owned = (problem.labels >= shard.start) & (problem.labels < shard.start + 32)
            assert torch.equal(state[8] != 0, is_owned) and torch.equal(state[9] != 0, is_owned)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_gradients(self, dtype: torch.dtype, ranks: int, temperature: float) -> None:
        problem = problem_of(dtype)
        self.check_gradients(problem, ranks, temperature)

    @pytest.mark.parametrize("column", [0, 1, 2, 3])
    def test_gradient_of_each_term(self, column: int) -> None:
        problem = problem_of(FLOAT32)
        alone = torch.zeros_like(problem.coefficients).index_fill_(1, torch.tensor([column]), 1.3)
        self.check_gradients(replace(problem, coefficients=alone), ranks=1, temperature=0.7)

    def test_gradients_of_more_token_tiles_than_a_group(self) -> None:
        """10 token tiles in groups of 8, over 3 vocabulary tiles."""
        problem = problem_of(FLOAT32, tokens=150, valid=70, padded=72, student_width=8, teacher_width=8)
        self.check_gradients(problem, 1, 1.0, replace(OPTIONS, tokens=150, vocab=72))

    def check_gradients(
        self, problem: Problem, ranks: int, temperature: float, options: TileOptions = OPTIONS
    ) -> None:
        inputs, dtype = problem.inputs(), problem.student_hidden.dtype
        stats = dense_stats(*inputs, valid=problem.valid, temperature=temperature)
        stats = TokenStats(*(value.float() for value in stats))
        expected_dh, expected_dw = dense_gradients(
            *inputs, problem.coefficients, valid=problem.valid, temperature=temperature
        )
        dh, shards = torch.zeros_like(expected_dh), []
        for rank in range(ranks):
            local, shard = problem.local(rank, ranks)
            # A float32 target shows the sums before they are rounded to the weight's dtype.
            target = torch.zeros(local.student_weight.shape)
            partial, none = linear_split_kl_grads(
                *local.inputs(),
                stats,
                local.coefficients,
                shard=shard,
                temperature=temperature,
                options=options,
                weight_grad=target,
            )
            assert none is None and partial.dtype == torch.float32
            dh += partial
            shards.append(target)
        dw = torch.cat(shards)
        assert_close_gradient(dh, expected_dh, dtype)
        assert_close_gradient(dw, expected_dw, dtype)
        assert not dw[problem.valid :].any()

    @pytest.mark.parametrize(
        ("dtype", "ranks", "topk"),
        [
            (torch.float32, 1, 0),
            (torch.bfloat16, 2, 0),
            (torch.float32, 1, 1),
            (torch.float32, 2, 5),
            (torch.bfloat16, 4, 5),
            (torch.float32, 4, 16),
        ],
    )
    def test_entropy_and_topk(self, dtype: torch.dtype, ranks: int, topk: int) -> None:
        problem = problem_of(dtype, tokens=13)
        state = merged_teacher(problem, ranks, topk)
        expected = dense_stats(*problem.inputs(), valid=problem.valid, temperature=0.7)
        m, s, u, z_y = state.rows
        assert float((m + s.log() - expected.teacher_lse).abs().max()) <= 1e-5
        assert float((s.log() - u / s - expected.teacher_entropy).abs().max()) <= 1e-5
        assert float((z_y - expected.teacher_lse - expected.teacher_logprob).abs().max()) <= 1e-5
        if not topk:
            assert state.topk_logits is None and state.topk_ids is None
            return
        assert state.topk_logits is not None and state.topk_ids is not None
        logits, ids = teacher_logits(problem).topk(topk)
        assert torch.equal(state.topk_ids, ids)
        assert float((state.topk_logits - logits).abs().max()) <= 1e-5

    @pytest.mark.parametrize("topk", [64, 128])
    def test_topk_of_the_default_size_and_the_largest(
        self, topk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a vocabulary tile as wide as the shipped one: a tile is sorted for its K largest."""
        monkeypatch.setitem(BACKENDS, "triton", TritonBackend(tile=Tile(16, 128, 32)))
        problem = problem_of(FLOAT32, tokens=5, valid=301, padded=304)
        state = merged_teacher(problem, 1, topk)
        logits, ids = teacher_logits(problem).topk(topk)
        assert state.topk_ids is not None and state.topk_logits is not None
        assert torch.equal(state.topk_ids, ids)
        assert float((state.topk_logits - logits).abs().max()) <= 1e-5

    def test_a_whole_tail_loss_allocates_no_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Teacher's top-k, student's pass, support gradient; the same numbers as the torch backend's.

        The interpreter copies every tensor as bytes; only other outputs count.
        """
        # Few and large tiles: the interpreter's time goes with their number.
        monkeypatch.setitem(BACKENDS, "triton", TritonBackend(tile=Tile(64, 256, 32)))
        problem = problem_of(FLOAT32, tokens=40, valid=1000, padded=1008, student_width=4, teacher_width=4)
        results = []
        for backend in ("triton", "torch"):
            options = TileOptions(backend=backend, tokens=8, vocab=512)
            weight, hidden = (
                Parameter(problem.student_weight),
                problem.student_hidden.clone().requires_grad_(),
            )
            with LargestOutput() as largest:
                loss = topk_loss_on_own_topk(problem, hidden, weight, topk=8, options=options)
                loss.backward()
            assert largest.numel < 40 * 1000 / 8
            results.append((loss.detach(), hidden.grad, weight.grad))
        for ours, expected in zip(*results, strict=True):
            assert ours is not None and expected is not None
            assert relative_error(ours, expected) <= 1e-5

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_equal_logits_go_to_the_smaller_id(self, ranks: int) -> None:
        """Ten distinct rows, repeated over tiles and shards; small integers, so that equal means equal."""
        generator = torch.Generator().manual_seed(2)
        rows = torch.randint(-3, 4, (10, 8), generator=generator).float()
        problem = problem_of(FLOAT32, tokens=5, valid=141, padded=144, teacher_width=8)
        hidden = torch.randint(-3, 4, (5, 8), generator=generator).float()
        problem = replace(
            problem, teacher_hidden=hidden, teacher_weight=rows.repeat(15, 1)[:144].contiguous()
        )
        state = merged_teacher(problem, ranks, 16)
        # The float64 logits of equal rows are equal.
        order = teacher_logits(problem).sort(dim=1, descending=True, stable=True).indices
        assert state.topk_ids is not None
        assert torch.equal(state.topk_ids, order[:, :16])

    def test_slots_of_a_shard_with_few_rows_stay_empty(self) -> None:
        problem = problem_of(FLOAT32, tokens=3, valid=99)
        local, shard = problem.local(3, 4)
        operands = local.teacher_hidden, local.teacher_weight, local.labels
        state = linear_entropy(*operands, shard=shard, temperature=0.7, topk=5, options=OPTIONS)
        assert state.topk_logits is not None and state.topk_ids is not None
        logits, ids = teacher_logits(problem)[:, 96:].sort(dim=1, descending=True)
        assert torch.equal(state.topk_ids[:, :3], ids + 96)
        assert float((state.topk_logits[:, :3] - logits).abs().max()) <= 1e-5
        assert bool((state.topk_logits[:, 3:] == torch.tensor(SENTINEL)).all())
        assert bool((state.topk_ids[:, 3:] == NO_ID).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gathered_logits(self, dtype: torch.dtype) -> None:
        """9 ids: more than a program takes; a hidden size above one step of its loop; ids of nobody."""
        problem = problem_of(dtype, teacher_width=264)
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(-4, 140, (19, 9), generator=generator)
        ids[0, 0], ids[1, 8] = NO_ID, problem.valid - 1
        state = merged_teacher(problem, 2, 0, ids)
        logits = torch.nn.functional.pad(teacher_logits(problem), (0, 1))
        is_nobody = (ids < 0) | (ids >= problem.valid)
        expected = logits.gather(1, ids.masked_fill(is_nobody, problem.valid))
        assert state.gathered is not None and bool(is_nobody.any())
        assert float((state.gathered - expected).abs().max()) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_support_gradients(self, dtype: torch.dtype, ranks: int) -> None:
        problem = problem_of(dtype)
        generator = torch.Generator().manual_seed(4)
        tokens, valid = 19, problem.valid
        ids = torch.stack([torch.randperm(valid, generator=generator)[:9] for _ in range(tokens)])
        ids[::4, 7:] = NO_ID
        log_p = teacher_logits(problem).log_softmax(1)
        lse = teacher_logits(problem).logsumexp(1).float()
        offset, slope = torch.randn(2, tokens, generator=generator)
        values = torch.randn(tokens, 9, generator=generator)
        dz = log_p.exp() * (offset.double()[:, None] + slope.double()[:, None] * log_p)
        for token in range(tokens):
            held = ids[token] != NO_ID
            dz[token, ids[token, held]] = values[token, held].double()
        dz /= 0.7
        dh, shards = torch.zeros(problem.teacher_hidden.shape, dtype=torch.float64), []
        for rank in range(ranks):
            local, shard = problem.local(rank, ranks)
            target = torch.zeros(local.teacher_weight.shape)
            partial, none = linear_support_grads(
                local.teacher_hidden,
                local.teacher_weight,
                SupportGradient(lse, offset, slope, ids, values),
                shard=shard,
                temperature=0.7,
                options=OPTIONS,
                weight_grad=target,
            )
            assert none is None
            dh += partial
            shards.append(target)
        dw = torch.cat(shards)
        assert_close_gradient(dh, dz @ problem.teacher_weight[:valid].double(), dtype)
        assert_close_gradient(dw[:valid], dz.t() @ problem.teacher_hidden.double(), dtype)
        assert not dw[valid:].any()

    def test_two_runs_are_bitwise_equal(self) -> None:
        problem = problem_of(torch.bfloat16)
        first, second = (merged_state(problem, 1, options=OPTIONS) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(("tokens", "valid"), [(0, 117), (19, 60)])
    def test_nothing_to_do(self, tokens: int, valid: int) -> None:
        """No token; or a last shard that is all padding."""
        problem = make_problem(tokens=tokens, valid=valid)
        local, shard = problem.local(3, 4)
        state = linear_stats(*local.inputs(), shard=shard, options=OPTIONS)
        empty = empty_state(tokens, dtype=torch.float32, device=state.device)
        assert torch.equal(state, empty)
        ids = torch.zeros(tokens, 2, dtype=torch.int64)
        operands = local.student_hidden, local.student_weight, local.labels
        entropy = linear_entropy(*operands, shard=shard, topk=3, gather_ids=ids, options=OPTIONS)
        assert entropy.topk_ids is not None and entropy.gathered is not None
        assert torch.equal(entropy.rows[0], empty[0]) and not entropy.rows[1:].any()
        assert entropy.topk_ids.shape == (tokens, 3) and bool((entropy.topk_ids == NO_ID).all())
        assert entropy.gathered.shape == (tokens, 2) and not entropy.gathered.any()
        stats = TokenStats(*torch.zeros(8, tokens))
        dh, dw = linear_split_kl_grads(
            *local.inputs(), stats, local.coefficients, shard=shard, options=OPTIONS
        )
        assert dh.shape == local.student_hidden.shape and not dh.any()
        assert dw is not None and not dw.any()

    def test_dtypes_that_are_not_compiled(self) -> None:
        problem = problem_of(torch.float16)
        with pytest.raises(ValueError, match=r"student_hidden is torch.float16, wanted bfloat16 or float32"):
            linear_stats(*problem.inputs(), shard=VocabShard(0, problem.valid), options=OPTIONS)
        teacher = problem_of(torch.bfloat16)
        mixed = replace(
            problem_of(FLOAT32), teacher_hidden=teacher.teacher_hidden, teacher_weight=teacher.teacher_weight
        )
        with pytest.raises(
            ValueError, match=r"teacher_hidden is torch.bfloat16, .* the same as student_hidden"
        ):
            linear_stats(*mixed.inputs(), shard=VocabShard(0, problem.valid), options=OPTIONS)

    @pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 6), (torch.bfloat16, 12)])
    def test_rows_that_tma_cannot_read(self, dtype: torch.dtype, width: int) -> None:
        problem = problem_of(dtype, teacher_width=width)
        message = r"teacher_hidden of shape \(19, \d+\) has rows of 24 bytes .* use backend 'cuda' or 'torch'"
        with pytest.raises(ValueError, match=message):
            linear_stats(*problem.inputs(), shard=VocabShard(0, problem.valid), options=OPTIONS)
