"""Estimators against counting by hand, published intervals and exact bootstrap distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sead_megatron.evaluation.estimators import (
    average_interval,
    pass_at_k,
    pass_ks,
    percentile_interval,
    resampled_means,
    sample_means,
    wilson,
)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_counts_subsets(samples: int) -> None:
    """Every subset of k of the n responses is as likely; how many hold a right one?"""
    for correct in range(samples + 1):
        responses = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(responses, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-15
            )


@pytest.mark.parametrize(("share", "samples", "k"), [(0.3, 8, 4), (0.05, 32, 16), (0.9, 5, 2)])
def test_pass_at_k_is_unbiased(share: float, samples: int, k: int) -> None:
    """Its expectation over c ~ Binomial(n, p) is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is not."""
    weights = [math.comb(samples, c) * share**c * (1 - share) ** (samples - c) for c in range(samples + 1)]
    expected = sum(weight * pass_at_k(samples, c, k) for c, weight in enumerate(weights))
    plugged_in = sum(weight * (1 - (1 - c / samples) ** k) for c, weight in enumerate(weights))
    assert expected == pytest.approx(1 - (1 - share) ** k, abs=1e-12)
    assert abs(plugged_in - expected) > 1e-3


def test_pass_at_1_is_the_pass_rate_and_large_numbers_are_exact() -> None:
    assert pass_at_k(32, 9, 1) == pytest.approx(9 / 32, abs=1e-15)
    # Floating-point products of 1 - k / i lose this one.
    assert pass_at_k(4096, 1, 2048) == 0.5


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_no_estimate(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="no estimate of pass@"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    ("samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_ks(samples: int, expected: list[int]) -> None:
    assert pass_ks(samples) == expected


# Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_as_published(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(1, 30), (15, 30), (436, 500), (7, 7)])
def test_wilson_bounds_solve_its_equation(correct: int, total: int) -> None:
    """At both bounds p the observed share is 1.96 standard errors of p away."""
    share = correct / total
    for p in wilson(correct, total):
        if p < 1:
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), rel=1e-5)
    assert wilson(total - correct, total) == pytest.approx([1 - p for p in reversed(wilson(correct, total))])


def test_wilson_of_nothing() -> None:
    with pytest.raises(ValueError, match="no interval of 0 of 0"):
        wilson(0, 0)


VALUES = np.array([0.0, 0.125, 0.5, 0.875, 1.0])


def test_resampled_means_have_the_exact_distribution() -> None:
    """Against all 5^5 draws: distribution function, and the bounds that follow from it."""
    exact = np.sort([np.mean(draw) for draw in itertools.product(VALUES, repeat=len(VALUES))])
    means = resampled_means("AIME24", VALUES[:, None])[:, 0]
    for quantile in (0.025, 0.25, 0.5, 0.75, 0.975):
        position = np.searchsorted(np.sort(means), np.quantile(exact, quantile), side="right") / len(means)
        wanted = np.searchsorted(exact, np.quantile(exact, quantile), side="right") / len(exact)
        assert position == pytest.approx(wanted, abs=0.015)
    assert percentile_interval(means) == pytest.approx(tuple(np.quantile(exact, [0.025, 0.975])), abs=0.03)


def test_draws_follow_from_the_name_alone() -> None:
    first = resampled_means("AIME24", VALUES[:, None])
    assert np.array_equal(first, resampled_means("AIME24", VALUES[:, None]))
    assert not np.array_equal(first, resampled_means("AIME25", VALUES[:, None]))


def test_draws_of_methods_are_paired() -> None:
    """A method that is better by 0.1 on every problem is better by 0.1 in every draw: an interval of one point."""
    both = resampled_means("AIME24", np.stack([VALUES, VALUES + 0.1], axis=1))
    assert np.ptp(both[:, 0]) > 0.5
    assert both[:, 1] - both[:, 0] == pytest.approx(0.1, abs=1e-12)
    alone = resampled_means("AIME24", VALUES[:, None] + 0.1)[:, 0]
    assert alone == pytest.approx(both[:, 1], abs=1e-15)


def test_benchmarks_are_drawn_independently() -> None:
    """The standard error of a mean over four benchmarks of equal spread is half that of one."""
    generator = np.random.default_rng(0)
    values = generator.random(400)
    one = average_interval({"a": values})
    four = average_interval({name: values for name in "abcd"})
    assert (four[1] - four[0]) / (one[1] - one[0]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(four) == pytest.approx(values.mean(), abs=0.002)


def test_a_small_benchmark_counts_as_much_as_a_large_one() -> None:
    low, high = average_interval({"large": np.zeros(300), "small": np.ones(3)})
    assert (low, high) == (0.5, 0.5)


def test_sample_means() -> None:
    assert sample_means([[True, False, False, False], [True, True, True, True]]).tolist() == [0.25, 1.0]
