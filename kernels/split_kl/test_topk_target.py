"""Supports of a top-k loss and the statistics of overlapping lists, against dense float64 models and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sead_kernels.split_kl import (
    EntropyStats,
    TileOptions,
    TopKTarget,
    finalize_entropy,
    support_mass,
    teachability_margin,
    topk_overlap,
)
from sead_kernels.split_kl.testing import SMALL_TILES, make_problem, merged_entropy
from sead_kernels.split_kl.topk import NO_ID, in_row
from torch import Tensor

TOPK = 12


def both_models(
    tiles: TileOptions = SMALL_TILES,
) -> tuple[EntropyStats, EntropyStats, Tensor, Tensor]:
    """(student, teacher with the student's ids gathered, dense ln p, dense ln q)."""
    problem = make_problem()
    student = finalize_entropy(
        merged_entropy(problem, 2, model="student", topk=TOPK, options=tiles), problem.valid
    )
    teacher = finalize_entropy(
        merged_entropy(problem, 2, topk=TOPK, gather_ids=student.topk_ids, options=tiles), problem.valid
    )
    dense = [
        (hidden.double() @ weight[: problem.valid].double().t()).log_softmax(1)
        for hidden, weight in (problem.inputs()[:2], problem.inputs()[2:4])
    ]
    return student, teacher, dense[0], dense[1]


def sets(logprobs: Tensor) -> list[set[int]]:
    return [set(row) for row in logprobs.topk(TOPK, dim=1).indices.tolist()]


def test_supports(tiles: TileOptions) -> None:
    """Ids, log-probabilities and tail mass of each; at least one row shares nothing, and one shares something."""
    student, teacher, log_p, log_q = both_models(tiles)
    pairs = list(zip(sets(log_p), sets(log_q), strict=True))
    assert any(not a & b for a, b in pairs) and any(len(a & b) > 1 for a, b in pairs)
    wanted = {
        "teacher": [b for _, b in pairs],
        "student": [a for a, _ in pairs],
        "union": [a | b for a, b in pairs],
        "intersection": [a & b for a, b in pairs],
    }
    for support, rows in wanted.items():
        target = TopKTarget.of(teacher, support, student.topk_ids)
        assert target.ids.shape == target.logprobs.shape == (19, 2 * TOPK if support == "union" else TOPK)
        for t, row in enumerate(rows):
            held = target.ids[t] != NO_ID
            ids = target.ids[t][held]
            assert len(ids) == len(row) and set(ids.tolist()) == row, support
            assert held.any() or support == "intersection"
            torch.testing.assert_close(target.logprobs[t][held].double(), log_q[t][ids], rtol=0, atol=2e-6)
            rest = 1 - float(log_q[t][ids].exp().sum())
            assert float(target.tail_mass[t]) == pytest.approx(rest, abs=1e-6), support


def test_a_tail_of_rounding_is_not_negative() -> None:
    """The masses of a union are subtracted from the teacher's tail one by one."""
    own = EntropyStats(
        lse=torch.zeros(1),
        entropy=torch.zeros(1),
        logprob=torch.zeros(1),
        tail_mass=torch.tensor([0.1]),
        topk_ids=torch.tensor([[0]]),
        topk_logprobs=torch.tensor([[0.9]]).log(),
        support_logprobs=torch.tensor([[0.1 + 1e-6]]).log(),
        support_tail_mass=torch.tensor([0.9]),
    )
    target = TopKTarget.of(own, "union", torch.tensor([[1]]))
    assert target.tail_mass.tolist() == [0]


def test_wrong_supports() -> None:
    student, teacher, _, _ = both_models()
    ids = student.topk_ids
    assert ids is not None
    without_topk = teacher._replace(topk_ids=None, topk_logprobs=None, tail_mass=None)
    for support in ("teacher", "union", "intersection"):
        with pytest.raises(ValueError, match=r"teacher has no top-k, wanted .*topk=K"):
            TopKTarget.of(without_topk, support, ids)
    assert torch.equal(TopKTarget.of(without_topk, "student", ids).ids, ids)
    without_gathered = teacher._replace(support_logprobs=None)
    for support in ("student", "union"):
        with pytest.raises(
            ValueError, match=r"support_logprobs has shape None, wanted \(19, 12\) like student"
        ):
            TopKTarget.of(without_gathered, support, ids)
        with pytest.raises(ValueError, match=r"support_logprobs has shape \(19, 12\), wanted \(19, 11\)"):
            TopKTarget.of(teacher, support, ids[:, 1:])
        with pytest.raises(ValueError, match=rf"student_ids is None, wanted .* for support '{support}'"):
            TopKTarget.of(teacher, support)
    with pytest.raises(ValueError, match=r"support is 'both', wanted one of teacher, student, union, inter"):
        TopKTarget.of(teacher, "both", ids)


def test_ids_in_a_row() -> None:
    ids = torch.tensor([[3, 9, 0], [3, 9, 0]])
    others = torch.tensor([[9, 1], [0, 3]])
    assert in_row(ids, others).tolist() == [[False, True, False], [True, False, True]]
    generator = torch.Generator().manual_seed(1)
    ids, others = (torch.randint(0, 40, (50, width), generator=generator) for width in (9, 13))
    assert torch.equal(in_row(ids, others), (ids[:, :, None] == others[:, None]).any(2))


def test_overlap_and_masses() -> None:
    student, teacher, log_p, log_q = both_models()
    assert student.topk_ids is not None and teacher.topk_ids is not None
    overlap = topk_overlap(student.topk_ids, teacher.topk_ids)
    shared = [len(a & b) / TOPK for a, b in zip(sets(log_p), sets(log_q), strict=True)]
    assert overlap.tolist() == pytest.approx(shared)
    assert topk_overlap(student.topk_ids[:, :4], student.topk_ids[:, :3]).tolist() == [0.75] * 19
    assert teacher.support_logprobs is not None and teacher.support_tail_mass is not None
    mass = support_mass(student.topk_ids, teacher.support_logprobs)
    wanted = log_q.exp().gather(1, student.topk_ids).sum(1)
    torch.testing.assert_close(mass.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(mass, 1 - teacher.support_tail_mass, rtol=0, atol=1e-6)
    ids, logprobs = torch.tensor([[4, NO_ID]]), torch.tensor([[math.log(0.25), 3.0]])
    assert support_mass(ids, logprobs).tolist() == [0.25]


def test_margin() -> None:
    """a = (0.5, 3, 1): 3 - 1, and 3 - 1.5."""
    log_p = torch.tensor([[-1.0, -4.0, -2.0]])
    log_q = torch.tensor([[-0.5, -1.0, -1.0]])
    assert teachability_margin(log_p, log_q).tolist() == [2.0]
    assert teachability_margin(log_p, log_q, "mean").tolist() == [1.5]
    # Two equal best ones are not told apart; a factor of one model's normalisation does not matter.
    assert teachability_margin(log_p, log_p + 7).tolist() == [0.0]
    with pytest.raises(
        ValueError, match=r"teacher_logprobs has shape \(1, 2\), wanted \(1, 3\) like student"
    ):
        teachability_margin(log_p, log_q[:, :2])
    with pytest.raises(ValueError, match=r"with two columns or more"):
        teachability_margin(log_p[:, :1], log_q[:, :1])
    with pytest.raises(ValueError, match=r"kind is 'median', wanted second or mean"):
        teachability_margin(log_p, log_q, "median")
