import math
from collections.abc import Callable
from fractions import Fraction
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sead_megatron.data.terms import Zone
from sead_megatron.objectives.zones import (
    ZoneScore,
    ZoneThresholds,
    assign_by_rank,
    assign_by_threshold,
    implied_thresholds,
    zone_counts,
)

A, B, C = (int(zone) for zone in Zone)
SCORES = st.sampled_from(["max_rank", "student", "sum_rank"])
# Few distinct values: most tokens of a trained model have an entropy of practically 0.
TIED = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.0, 0.25])), max_size=60
)


def distinct(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator).float(), torch.randperm(
        size, generator=generator
    ).float()


def columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def reference(
    teacher: list[float], student: list[float], share_a: float, share_c: float, score: ZoneScore
) -> list[int]:
    """The rule of the module docstring with sorted() and nothing else."""
    size = len(teacher)
    count_a, _, count_c = zone_counts(size, share_a, share_c)
    teacher_rank = {i: rank for rank, i in enumerate(sorted(range(size), key=lambda i: (teacher[i], i)))}
    student_rank = {i: rank for rank, i in enumerate(sorted(range(size), key=lambda i: (student[i], i)))}
    joints: dict[str, Callable[[int, int], int]] = {
        "max_rank": max,
        "sum_rank": add,
        "student": lambda _, s: s,
    }
    in_c = sorted(range(size), key=teacher_rank.__getitem__)[size - count_c :]
    rest = [i for i in range(size) if i not in in_c]
    in_a = sorted(rest, key=lambda i: (joints[score](teacher_rank[i], student_rank[i]), student_rank[i]))[
        :count_a
    ]
    return [C if i in in_c else A if i in in_a else B for i in range(size)]


@pytest.mark.parametrize(
    ("size", "share_a", "share_c", "counts"),
    [
        (10, 50, 10, (5, 4, 1)),
        (22541, 50, 10, (11270, 9017, 2254)),
        (0, 50, 10, (0, 0, 0)),
        (1, 50, 10, (0, 1, 0)),
        (2, 50, 10, (1, 1, 0)),
        (5, 50, 10, (2, 2, 1)),
        (100, 29, 7, (29, 64, 7)),
        (1, 50, 50, (0, 0, 1)),
        (3, 50, 50, (1, 0, 2)),
        (7, 100, 0, (7, 0, 0)),
        (7, 0, 100, (0, 0, 7)),
        (3, 33.4, 33.3, (1, 1, 1)),
    ],
)
def test_counts_round_to_nearest_and_halves_train(
    size: int, share_a: float, share_c: float, counts: tuple[int, int, int]
) -> None:
    assert zone_counts(size, share_a, share_c) == counts


@settings(deadline=None)
@given(st.integers(0, 10**7), st.integers(0, 1000), st.data())
def test_counts_are_less_than_one_token_from_the_shares(
    size: int, tenths_a: int, data: st.DataObject
) -> None:
    tenths_c = data.draw(st.integers(0, 1000 - tenths_a))
    counts = zone_counts(size, tenths_a / 10, tenths_c / 10)
    shares = (tenths_a, 1000 - tenths_a - tenths_c, tenths_c)
    assert sum(counts) == size
    for count, share in zip(counts, shares, strict=True):
        assert count >= 0 and abs(count - Fraction(share * size, 1000)) < 1
        assert share or count == 0


def test_hand_made_tokens() -> None:
    teacher = torch.tensor([0.0, 2.0, 0.1, 0.2, 0.3, 1.0, 0.4, 0.5, 0.6, 0.7])
    student = torch.tensor([0.0, 0.1, 1.5, 0.2, 0.3, 1.2, 0.4, 1.1, 0.5, 0.6])
    # teacher ranks 0 9 1 2 3 8 4 5 6 7, student ranks 0 1 9 2 3 8 4 7 5 6; C = {1}
    # max_rank 0 . 9 2 3 8 4 7 6 7: A = {0, 3, 4, 6, 8}
    assert assign_by_rank(teacher, student, 50, 10).tolist() == [A, C, B, A, A, B, A, B, A, B]
    # the student alone lets 9 (rank 6) in no earlier than 8 (rank 5)
    assert assign_by_rank(teacher, student, 50, 10, "student").tolist() == [A, C, B, A, A, B, A, B, A, B]
    # sums 0 . 10 4 6 16 8 12 11 13: token 2 (10) before token 8 (11)
    assert assign_by_rank(teacher, student, 50, 10, "sum_rank").tolist() == [A, C, A, A, A, B, A, B, B, B]


def test_student_score_ignores_the_teacher_below_c() -> None:
    teacher, student = torch.tensor([0.9, 0.1, 0.2, 5.0]), torch.tensor([0.0, 0.5, 0.4, 9.0])
    assert assign_by_rank(teacher, student, 25, 25, "student").tolist() == [A, B, B, C]
    assert assign_by_rank(teacher, student, 25, 25, "max_rank").tolist() == [B, B, A, C]


def test_equal_scores_skip_the_token_the_student_is_sure_of() -> None:
    # ranks (2, 0), (0, 2), (1, 1): both of the first two score 2; B wants low teacher, high student entropy
    for order in ([0, 1, 2], [1, 0, 2]):
        teacher, student = torch.tensor([2.0, 0.0, 1.0])[order], torch.tensor([0.0, 2.0, 1.0])[order]
        zones = assign_by_rank(teacher, student, 67, 0)
        assert zones.tolist() == [[A, B, A][i] for i in order]


def test_equal_entropies_rank_in_table_order() -> None:
    zones = assign_by_rank(torch.zeros(10), torch.zeros(10), 50, 10)
    assert zones.tolist() == [A] * 5 + [B] * 4 + [C]
    assert zones.dtype == torch.int8


@pytest.mark.parametrize(("size", "expected"), [(0, []), (1, [B]), (2, [A, B])])
def test_tiny_batches(size: int, expected: list[int]) -> None:
    assert assign_by_rank(torch.arange(size) * 1.0, torch.arange(size) * 1.0, 50, 10).tolist() == expected


def test_nan_is_never_skipped_by_rank() -> None:
    teacher = torch.tensor([math.nan, 0.1, 0.2, 0.3])
    student = torch.tensor([0.0, 0.1, math.nan, 0.2])
    assert assign_by_rank(teacher, student, 50, 25).tolist() == [C, A, B, A]


@settings(deadline=None)
@given(TIED, SCORES, st.sampled_from([(50, 10), (20, 30), (0, 10), (50, 0), (100, 0), (0, 100)]))
def test_matches_the_sorted_reference_with_exact_shares_under_heavy_ties(
    pairs: list[tuple[float, float]], score: ZoneScore, shares: tuple[int, int]
) -> None:
    teacher, student = columns(pairs)
    zones = assign_by_rank(teacher, student, *shares, score)
    assert zones.tolist() == reference(teacher.tolist(), student.tolist(), *shares, score)
    assert tuple(torch.bincount(zones.long(), minlength=3).tolist()) == zone_counts(len(pairs), *shares)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 2**31), SCORES)
def test_permuting_the_table_permutes_the_zones(size: int, seed: int, score: ZoneScore) -> None:
    teacher, student = distinct(size, seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 1))
    zones = assign_by_rank(teacher, student, 50, 10, score)
    assert torch.equal(assign_by_rank(teacher[order], student[order], 50, 10, score), zones[order])


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 2**31), st.sampled_from(["max_rank", "student"]))
def test_implied_thresholds_give_the_zones_back(size: int, seed: int, score: ZoneScore) -> None:
    teacher, student = distinct(size, seed)
    zones = assign_by_rank(teacher, student, 50, 10, score)
    thresholds = implied_thresholds(zones, teacher, student, score)
    assert torch.equal(assign_by_threshold(teacher, student, thresholds), zones)


def test_thresholds_by_hand() -> None:
    teacher, student = torch.tensor([0.1, 0.2, 0.3, 2.0, 3.0]), torch.tensor([0.5, 0.4, 9.0, 0.0, 0.0])
    zones = torch.tensor([A, A, B, C, C], dtype=torch.int8)
    thresholds = implied_thresholds(zones, teacher, student)
    assert (thresholds.teacher, thresholds.a_student) == (2.0, 0.5)
    assert thresholds.a_teacher == pytest.approx(0.2) and thresholds.joint == 0.5
    assert thresholds.metrics() == pytest.approx(
        {
            "zone/threshold_teacher": 2.0,
            "zone/threshold_a_teacher": 0.2,
            "zone/threshold_a_student": 0.5,
            "zone/threshold_joint": 0.5,
        }
    )
    fresh = assign_by_threshold(
        torch.tensor([0.2, 0.2, 0.21, 2.0, 1.9]), torch.tensor([0.5, 0.6, 0.1, 0, 0]), thresholds
    )
    assert fresh.tolist() == [A, B, B, C, B]


def test_thresholds_of_the_student_score_leave_the_teacher_free_below_c() -> None:
    teacher, student = torch.tensor([0.1, 0.2, 0.9, 3.0]), torch.tensor([0.1, 0.5, 0.6, 0.0])
    zones = assign_by_rank(teacher, student, 25, 25, "student")
    assert zones.tolist() == [A, B, B, C]
    thresholds = implied_thresholds(zones, teacher, student, "student")
    fresh = torch.tensor([2.9, 2.9, 3.0]), torch.tensor([0.1, 0.2, 0.1])
    assert assign_by_threshold(*fresh, thresholds).tolist() == [A, B, C]
    assert set(thresholds.metrics()) == {"zone/threshold_teacher", "zone/threshold_a_student"}


def test_thresholds_of_empty_zones_hold_nothing_and_are_not_logged() -> None:
    teacher, student = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2])
    scores: tuple[ZoneScore, ...] = ("max_rank", "student")
    for score in scores:
        thresholds = implied_thresholds(torch.tensor([B, B], dtype=torch.int8), teacher, student, score)
        assert assign_by_threshold(teacher, student, thresholds).tolist() == [B, B]
        assert thresholds.metrics() == {}


def test_nan_is_never_skipped_by_threshold() -> None:
    thresholds = ZoneThresholds(teacher=1.0, a_teacher=math.inf, a_student=0.5)
    nan = torch.tensor([math.nan, 0.1]), torch.tensor([0.1, math.nan])
    assert assign_by_threshold(*nan, thresholds).tolist() == [B, B]
