"""One update rule, whatever the layout: loss, gradient norm, zones and weights of three steps on fixed rollouts.

The reference is one rank, packed rows. Layouts of the student and the teacher, the microbatch budget, packing and
the distributed optimizer may change the order of float32 sums and nothing else.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from packaging.version import Version

from sead_megatron.objectives.zones import implied_thresholds
from tests.distributed.launch import run_ranks
from tests.tiny_models import save_tiny_llama

Case = dict[str, Any]
# Float32 sums in another order; measured 3e-7 at most after three steps at lr 1e-2.
RELATIVE = 1e-5
# A token this near (nats) to a zone's border may change sides by rounding.
BORDER = 1e-6
STUDENTS = {
    "TP1": [1, 1],
    "TP2": [2, 1],
    "PP2": [1, 2],
    "TP2 PP2": [2, 2],
    "TP2 sequence": [2, 1, True],
}
TEACHERS = {"TP1": [1, 1], "TP2": [2, 1], "PP2": [1, 2]}
BUDGETS_AND_PACKING = list(itertools.product((128, 64), (True, False)))


def _case(student: str, teacher: str, budget: int = 128, packing: bool = True, **more: Any) -> Case:
    return {
        "model": "untied",
        "student": STUDENTS[student],
        "teacher": TEACHERS[teacher],
        "max_tokens": budget,
        "packing": packing,
    } | more


def _product(ranks: int) -> list[Case]:
    """The full cross product, 72 cases over the worlds: 6 students x 3 teachers x 2 budgets x packed or not.

    One rank: student and teacher TP1. Two: students TP2, PP2, DP2 (TP1 on two ranks) and TP2 sequence with every
    teacher. Four: TP2 PP2 with every teacher, and TP1 as DP4 with the sharded teachers.
    """
    pairs = {
        1: [("TP1", "TP1")],
        2: list(itertools.product(("TP1", "TP2", "PP2", "TP2 sequence"), TEACHERS)),
        4: [*(("TP2 PP2", teacher) for teacher in TEACHERS), ("TP1", "TP2"), ("TP1", "PP2")],
    }
    return [_case(*pair, *rest) for pair in pairs[ranks] for rest in BUDGETS_AND_PACKING]


def _covering(ranks: int) -> list[Case]:
    """Every pair of layouts once, budgets and packing in turn; then tied weights and the plain optimizer."""
    cases = _product(ranks)
    covering = cases if ranks == 1 else [cases[i + i // 4 % 4] for i in range(0, len(cases), 4)]
    students = {1: ("TP1",), 2: ("TP1", "TP2", "PP2", "TP2 sequence"), 4: ("TP2 PP2",)}[ranks]
    return [
        *covering,
        *(_case(student, "TP1", model="tied") for student in students),
        *(_case(student, "TP1", distributed=False) for student in students[:3]),
    ]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Student and teacher of different sizes, and where the reference weights go."""
    path = tmp_path_factory.mktemp("updates")
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "initializer_range": 0.1,
    }
    students = {
        name: str(save_tiny_llama(path / name, seed=1, tie_word_embeddings=name == "tied", **small))
        for name in ("untied", "tied")
    }
    teacher = str(save_tiny_llama(path / "teacher", seed=2, initializer_range=0.1))
    return {"students": students, "teacher": teacher, "references": str(path)}


@pytest.fixture(scope="module")
def one_rank(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, Any]]:
    """The covering cases on one rank; the first case of each student is its reference."""
    cases = _covering(1)
    return list(
        zip(
            cases,
            run_ranks("update", 1, tmp_path_factory.mktemp("one"), cases=cases, **arguments),
            strict=True,
        )
    )


def flipped_tokens(reference: Any, result: Any) -> tuple[list[int], list[int]]:
    """Tokens of the steps with another zone than in the reference: (at a border, anywhere else).

    At a border: teacher entropy within BORDER of the teacher's threshold of C or A, or student entropy within it of
    the student's threshold of A.
    """
    excused, wrong = [], []
    for step, zones in enumerate(result["zones"]):
        wanted = torch.tensor(reference["zones"][step])
        teacher = torch.tensor(reference["teacher_entropy"][step])
        student = torch.tensor(reference["student_entropy"][step])
        bounds = implied_thresholds(wanted, teacher, student)
        near = (teacher - bounds.teacher).abs() <= BORDER
        near |= (teacher - bounds.a_teacher).abs() <= BORDER
        near |= (student - bounds.a_student).abs() <= BORDER
        different = torch.tensor(zones) != wanted
        excused += (different & near).nonzero()[:, 0].tolist()
        wrong += (different & ~near).nonzero()[:, 0].tolist()
    return excused, wrong


def _relative(values: list[float], wanted: list[float]) -> float:
    return max(abs(v - w) / abs(w) for v, w in zip(values, wanted, strict=True))


def _check(one_rank: list[tuple[Case, Any]], results: list[tuple[Case, Any]]) -> None:
    references: dict[str, Any] = {}
    for case, result in one_rank:
        references.setdefault(case["model"], result)
    for case, result in results:
        reference = references[case["model"]]
        excused, wrong = flipped_tokens(reference, result)
        assert not wrong, (case, wrong)
        # A zone that flipped by rounding makes another loss; that such a case exists must not go unseen.
        assert not excused, f"{case}: tokens {excused} lie on a zone border; choose other seeds"
        assert _relative(result["loss"], reference["loss"]) <= RELATIVE, (
            case,
            result["loss"],
            reference["loss"],
        )
        assert _relative(result["grad_norm"], reference["grad_norm"]) <= RELATIVE, (case, result["grad_norm"])
        assert result["weight_difference"] <= RELATIVE, (case, result["weight_difference"])


def test_only_tokens_at_a_border_may_change_zones() -> None:
    """The exception for rounding excuses a token within 1e-6 nats of a threshold, and no other."""
    entropies = {
        "teacher_entropy": [[0.1, 0.2, 0.3, 1.0, 1.0 - 5e-7]],
        "student_entropy": [[0.1, 0.2, 0.5, 0.1, 0.5]],
    }
    reference = {"zones": [[0, 0, 1, 2, 1]], **entropies}
    assert flipped_tokens(reference, {"zones": [[0, 0, 1, 2, 1]]}) == ([], [])
    assert flipped_tokens(reference, {"zones": [[0, 0, 1, 1, 2]]}) == ([3, 4], [])
    assert flipped_tokens(reference, {"zones": [[1, 0, 0, 2, 1]]}) == ([], [0, 2])


def test_the_full_product_has_72_cases() -> None:
    """6 students x 3 teachers x 2 budgets x packed or not, none twice."""
    cases = [(ranks, str(case)) for ranks in (1, 2, 4) for case in _product(ranks)]
    assert len(cases) == len(set(cases)) == 72


def test_one_rank(one_rank: list[tuple[Case, Any]]) -> None:
    """Microbatch budget, packing, and the distributed optimizer do not change the update."""
    _check(one_rank, one_rank)
    assert min(min(result["loss"]) for _, result in one_rank) > 0.1
    untied, tied = one_rank[0][1]["loss"], next(r for c, r in one_rank if c["model"] == "tied")["loss"]
    assert untied != tied


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layouts(
    one_rank: list[tuple[Case, Any]], arguments: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    """Every pair of layouts updates the weights as one rank does.

    Negative control on two ranks: without the tensor-parallel marks Megatron drops rank 1's shards from the gradient
    norm, and the comparison sees it. From 0.19 on Megatron sets the marks of its layers itself.
    """
    cases = _covering(ranks)
    unmarked = [_case("TP2", "TP1", marked=False)] if ranks == 2 else []
    results = run_ranks("update", ranks, tmp_path, cases=cases + unmarked, **arguments)
    _check(one_rank, list(zip(cases, results[: len(cases)], strict=True)))
    for control in results[len(cases) :]:
        wanted = one_rank[0][1]["grad_norm"]
        if Version(megatron.core.__version__) < Version("0.19"):
            assert control["grad_norm"][0] < 0.9 * wanted[0], (control["grad_norm"], wanted)
        else:
            assert _relative(control["grad_norm"], wanted) <= RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_full_product(
    one_rank: list[tuple[Case, Any]], arguments: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    """All 72 combinations (the four of one rank are `test_one_rank`'s)."""
    cases = _product(ranks)
    results = run_ranks("update", ranks, tmp_path, timeout=900, cases=cases, **arguments)
    _check(one_rank, list(zip(cases, results, strict=True)))
