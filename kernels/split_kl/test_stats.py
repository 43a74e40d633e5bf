"""Pass 1 against the dense float64 oracle.

Tolerances: float32 sums of e^(z-m) over a few hundred terms and logits of magnitude 10 carry about 1e-6; 1e-5
leaves room for the merge's rescaling. float64 has nine more digits; 1e-12 is used. bf16 inputs are exact in
float32, so the oracle sees the same rounded inputs and the error is that of float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from sead_kernels.split_kl import (
    TileOptions,
    TokenStats,
    VocabShard,
    finalize,
    finalize_entropy,
    linear_entropy,
    linear_stats,
)
from sead_kernels.split_kl.reference import dense_stats, dense_topk_entropy
from sead_kernels.split_kl.state import empty_state, merge
from sead_kernels.split_kl.testing import SMALL_TILES, make_problem, merged_entropy, merged_state

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}


def assert_stats(actual: TokenStats, expected: TokenStats, tolerance: float) -> None:
    for name, value in actual._asdict().items():
        error = float((value.double() - getattr(expected, name)).abs().max())
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance}"


def test_hand_values() -> None:
    """Two tokens of a vocabulary of two, p = (3/4, 1/4), q = (1/2, 1/2), both labels."""
    hidden = torch.ones(2, 1, dtype=torch.float64)
    student = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    state = linear_stats(
        hidden, student, hidden, torch.zeros(2, 1).double(), torch.tensor([0, 1]), shard=VocabShard(0, 2)
    )
    stats = finalize(state)
    assert stats.student_entropy.tolist() == pytest.approx([0.75 * math.log(4 / 3) + 0.25 * math.log(4)] * 2)
    assert stats.teacher_entropy.tolist() == pytest.approx([math.log(2)] * 2)
    assert stats.forward_kl.tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2)] * 2)
    assert stats.reverse_kl.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)] * 2)
    assert stats.student_logprob.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert stats.teacher_logprob.tolist() == pytest.approx([math.log(0.5)] * 2)


# Ranks: the merge. Temperatures: scaling before the maximum. Tiles: one tile, ragged tails, one row or column
# each.
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_match_the_oracle(
    tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int, temperature: float
) -> None:
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    expected = dense_stats(*problem.inputs(), valid=problem.valid, temperature=temperature)
    state = merged_state(problem, ranks, temperature=temperature, options=tiles)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_stats(finalize(state), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens, vocab", [(1024, 4096), (1, 128), (19, 1), (5, 9)])
def test_tile_sizes_do_not_matter(tokens: int, vocab: int) -> None:
    problem = make_problem(dtype=torch.float64)
    expected = dense_stats(*problem.inputs(), valid=problem.valid)
    assert_stats(
        finalize(merged_state(problem, 1, options=TileOptions(tokens=tokens, vocab=vocab))), expected, 1e-12
    )


def test_a_rank_of_padding_only_changes_nothing() -> None:
    """valid = 60 of 128 rows: ranks 2 and 3 of 4 hold only padding, their state is the neutral element."""
    problem = make_problem(valid=60, dtype=torch.float64)
    local, shard = problem.local(3, 4)
    state = linear_stats(*local.inputs(), shard=shard, options=SMALL_TILES)
    assert torch.equal(state, empty_state(19, dtype=torch.float64, device=torch.device("cpu")))
    expected = dense_stats(*problem.inputs(), valid=60)
    assert_stats(finalize(merged_state(problem, 4)), expected, 1e-12)


def test_merge_is_associative_and_the_empty_state_neutral() -> None:
    problem = make_problem(dtype=torch.float64)
    parts = [
        linear_stats(*local.inputs(), shard=shard) for local, shard in (problem.local(r, 4) for r in range(4))
    ]
    left = merge(merge(merge(parts[0], parts[1]), parts[2]), parts[3])
    right = merge(parts[0], merge(parts[1], merge(parts[2], parts[3])))
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    empty = empty_state(19, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(merge(empty, left), left)
    assert torch.equal(merge(left, empty), left)


def test_maxima_that_grow_by_hundreds_neither_overflow_nor_lose_the_sums() -> None:
    """Increasing logits over one-column tiles move the maximum at every step, by up to 300."""
    hidden = torch.ones(1, 1)
    student = torch.tensor([[-600.0], [-300.0], [0.0], [0.5], [1.0], [1.5]])
    teacher = torch.tensor([[1.5], [1.0], [0.5], [0.0], [-300.0], [-600.0]])
    labels = torch.tensor([2])
    stats = finalize(
        linear_stats(
            hidden,
            student,
            hidden,
            teacher,
            labels,
            shard=VocabShard(0, 6),
            options=TileOptions(tokens=1, vocab=1),
        )
    )
    expected = dense_stats(hidden, student, hidden, teacher, labels, valid=6)
    for name, value in stats._asdict().items():
        assert float(value) == pytest.approx(float(getattr(expected, name)), rel=1e-6), name


def test_small_kl_survives_a_large_offset() -> None:
    """KL of 5e-7 to 5e-3, all logits near 30: centred sums keep it to 2e-6 (uncentred: 8e-6 and more)."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, hidden = 4096, torch.eye(3)
    student = 30 + 2 * torch.randn(vocabulary, 3, generator=generator)
    teacher = student + torch.randn(vocabulary, 3, generator=generator) * torch.tensor([1e-3, 1e-2, 1e-1])
    labels = torch.tensor([1, 2, 3])
    stats = finalize(
        linear_stats(
            hidden,
            student,
            hidden,
            teacher,
            labels,
            shard=VocabShard(0, vocabulary),
            options=TileOptions(vocab=500),
        )
    )
    expected = dense_stats(hidden, student, hidden, teacher, labels, valid=vocabulary)
    assert float(expected.reverse_kl[0]) < 1e-6 < 1e-3 < float(expected.reverse_kl[2])
    assert float((stats.reverse_kl - expected.reverse_kl).abs().max()) <= 2e-6
    assert float((stats.forward_kl - expected.forward_kl).abs().max()) <= 2e-6


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("topk", [0, 1, 5, 40, 117])
def test_entropy_matches_the_oracle(
    tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int, topk: int
) -> None:
    """topk 40 exceeds the rows of a shard of four ranks and the window of 24; 117 is the whole vocabulary."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    merged = merged_entropy(problem, ranks, temperature=0.7, topk=topk, options=tiles)
    stats = finalize_entropy(merged, problem.valid)
    expected = dense_stats(*problem.inputs(), valid=problem.valid, temperature=0.7)
    tolerance = TOLERANCE[dtype]
    for value, wanted in (
        (stats.lse, expected.teacher_lse),
        (stats.entropy, expected.teacher_entropy),
        (stats.logprob, expected.teacher_logprob),
    ):
        assert float((value - wanted).abs().max()) <= tolerance
    if not topk:
        assert stats.topk_entropy is None and stats.tail_mass is None and merged.topk_logits is None
        return
    entropy, tail = dense_topk_entropy(
        problem.teacher_hidden, problem.teacher_weight, topk, valid=problem.valid, temperature=0.7
    )
    assert stats.topk_entropy is not None and stats.tail_mass is not None and stats.topk_slack is not None
    # A tail that is exactly 0 comes out as the rounding of 1 - sum q, and -Q ln Q is steep there.
    steep = 16 if topk == problem.valid else 1
    assert float((stats.topk_entropy - entropy).abs().max()) <= steep * tolerance
    assert float((stats.tail_mass - tail).abs().max()) <= tolerance
    assert bool((stats.topk_entropy <= stats.entropy + steep * tolerance).all())
    assert bool((stats.entropy <= stats.topk_entropy + stats.topk_slack + tolerance).all())


def test_no_tokens() -> None:
    problem = make_problem(tokens=1)
    hidden, labels = problem.student_hidden[:0], problem.labels[:0]
    both = linear_stats(
        hidden,
        problem.student_weight,
        problem.teacher_hidden[:0],
        problem.teacher_weight,
        labels,
        shard=problem.shard(),
    )
    assert both.shape == (10, 0)
    state = linear_entropy(hidden, problem.student_weight, labels, shard=problem.shard(), topk=3)
    assert state.rows.shape == (4, 0) and state.topk_logits is not None and state.topk_logits.shape == (0, 3)
