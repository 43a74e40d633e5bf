"""The report's numbers against hand values and against the objective itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sead_megatron.data.types import Rollout, TokenTable
from sead_megatron.objectives.sead import Sead, SeadObjective
from sead_megatron.report.categories import CATEGORIES, categories, category_of_text, category_table
from sead_megatron.report.loading import distinct_names, load_runs
from sead_megatron.report.statistics import (
    Tokens,
    jaccard_of_top,
    newcombe,
    share_of_top_half,
    tokens_of,
    zone_shares,
)
from tests.report_runs import rollout_record, write_run


def tokens(zones: str, forward_kl: list[float], **changes: list[float] | list[str]) -> Tokens:
    count = len(forward_kl)
    columns = {
        name: np.array(changes.get(name, [math.nan] * count), dtype=float)
        for name in ("student_entropy", "teacher_entropy", "reverse_kl", "loss")
    }
    texts = [str(text) for text in changes.get("texts", ["x"] * count)]
    return Tokens(
        texts=texts, zones=np.array(list(zones), dtype="U1"), forward_kl=np.array(forward_kl), **columns
    )


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        (
            (56, 70, 48, 80),
            0.0524,
            0.3339,
        ),  # Newcombe 1998 (Statistics in Medicine 17:873), Table II, method 10
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_newcombe(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    assert newcombe(*counts) == pytest.approx((low, high), abs=5e-5)


def test_jaccard_of_the_top_fifth() -> None:
    """Ten positions, two taken each: {8, 9} and {0, 9} share one of three."""
    first = np.arange(10.0)
    second = np.array([8.0, 2, 0, 1, 3, 4, 5, 6, 7, 9])
    assert jaccard_of_top(first, second) == pytest.approx(1 / 3)
    assert jaccard_of_top(first, first) == 1.0
    assert jaccard_of_top(first, -first) == 0.0
    assert jaccard_of_top(first, second, share=0.4) == pytest.approx(3 / 5)  # {6..9} and {0, 7, 8, 9}


def test_jaccard_of_ties_and_unknown_values() -> None:
    ties = np.zeros(10)
    assert jaccard_of_top(ties, np.arange(10.0)) == 1.0  # equal values: the later token is the higher one
    with_nan = np.array([math.nan, *np.arange(9.0), math.nan])
    assert jaccard_of_top(with_nan, np.array([9.0, *np.arange(9.0), 99.0])) == 1.0
    assert math.isnan(jaccard_of_top(np.array([math.nan]), np.array([1.0])))


def test_shares_of_zones() -> None:
    shown = tokens("AABBBBCC", [0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 3.0, 1.0], loss=[0, 0, 1, 1, 1, 1, 2, 2])
    a, b, c = zone_shares(shown)
    assert [(z.count, z.tokens) for z in (a, b, c)] == [(2, 0.25), (4, 0.5), (2, 0.25)]
    assert [z.forward_kl for z in (a, b, c)] == pytest.approx([0.1, 0.5, 0.4])
    assert [z.loss for z in (a, b, c)] == pytest.approx([0.0, 0.5, 0.5])
    assert [z.concentration for z in (a, b, c)] == pytest.approx([0.4, 1.0, 1.6])


def test_shares_without_measurements() -> None:
    """A zone without tokens has no concentration, an unmeasured loss no shares; a rounded KL below 0 counts as 0."""
    a, b, c = zone_shares(tokens("AAB", [math.nan, -1e-7, 0.5]))
    assert [z.forward_kl for z in (a, b, c)] == [0.0, 1.0, 0.0]
    assert math.isnan(c.concentration) and all(math.isnan(z.loss) for z in (a, b, c))


def test_share_of_the_larger_half() -> None:
    assert share_of_top_half(np.array([1.0, 5.0, 0.0, 4.0])) == pytest.approx(0.9)
    assert share_of_top_half(np.array([math.nan, 3.0, 1.0])) == pytest.approx(0.75)
    assert math.isnan(share_of_top_half(np.zeros(4)))


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "sead"},
        {"name": "sead", "zone_c": "mix", "lambda_fkl": 3.0},
        {"name": "sead", "token_zones": False, "lambda_fkl": 0.5},
    ],
)
def test_loss_of_a_token_is_what_the_objective_weights_it_with(
    tmp_path: Path, objective: dict[str, object]
) -> None:
    generator = torch.Generator().manual_seed(3)
    columns = {
        name: torch.rand(20, generator=generator)
        for name in ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")
    }
    ids, zeros = np.zeros(20, dtype=np.int32), np.zeros(20, dtype=np.float32)
    rollout = Rollout(0, np.zeros(1, dtype=np.int32), ids, zeros, zeros, True, 0)
    table = TokenTable.from_rollouts([rollout], torch.device("cpu")).with_columns(**columns)
    coefficients = Sead(SeadObjective.model_validate(objective), 4).coefficients(table, 1)
    expected = (
        coefficients.weights[:, 0] * columns["forward_kl"]
        + coefficients.weights[:, 1] * columns["reverse_kl"]
    )

    zones = None if coefficients.zones is None else "".join("ABC"[z] for z in coefficients.zones.tolist())
    record = rollout_record(["x"] * 20, zones=zones) | {
        name: column.tolist() for name, column in columns.items()
    }
    run = write_run(tmp_path, {2: [record]}, steps=1, objective=objective)
    run.append_metrics({"step": 2, **coefficients.metrics})
    shown = tokens_of(load_runs([run.path])[0], [2])
    np.testing.assert_allclose(shown.loss, expected.double().numpy(), rtol=1e-6)


def test_tokens_of_several_steps_keep_their_order(tmp_path: Path) -> None:
    short, long = rollout_record(["a"]), rollout_record(["b", "c"], forward_kl=[None, 0.25], zones="CA")
    run = write_run(tmp_path, {1: [short, long], 2: [rollout_record(["d"], forward_kl=None)]})
    shown = tokens_of(load_runs([run.path])[0], [1, 2])
    assert (shown.texts, shown.zones.tolist()) == (["a", "b", "c", "d"], ["A", "C", "A", "A"])
    np.testing.assert_array_equal(shown.forward_kl, [0.0, math.nan, 0.25, math.nan])


@pytest.mark.parametrize(
    ("text", "category"),
    [
        (" so", "Reasoning transition"), ("Therefore,", "Reasoning transition"), ("something", "Other"),
        ("7", "Computation"), ("x2", "Computation"), (" +", "Computation"), ("**", "Computation"),
        ("≤", "Computation"), ("\\boxed", "Deterministic syntax"), ("{", "Deterministic syntax"),
        ("\n\n", "Deterministic syntax"), ("", "Deterministic syntax"), (" ", "Deterministic syntax"),
        (").", "Deterministic syntax"), ("\\boxed{x", "Other"), (" the", "Other"), ("然后", "Other"),
    ],
)  # fmt: skip
def test_category_of_a_text(text: str, category: str) -> None:
    assert category_of_text(text) == category


def test_strategy_forks_need_both_entropies_above_the_75th_percentile() -> None:
    """Of 0..4 the 75th percentile is 3: only 4 is above. Both entropies are that high at one position only."""
    shown = tokens(
        "CBBBA",
        [0.5, 0.1, 0.1, 0.1, 0.0],
        texts=["so", "so", "7", "{", "a"],
        teacher_entropy=[4, 0, 1, 2, 3],
        student_entropy=[4, 1, 0, 2, 3],
        reverse_kl=[0.2, 0.4, 0.0, 0.0, 0.0],
    )
    assert categories(shown) == [CATEGORIES[i] for i in (0, 1, 2, 3, 4)]
    elsewhere = tokens("B", [0.1], texts=["so"], teacher_entropy=[1], student_entropy=[1])
    assert categories(elsewhere) == ["Reasoning transition"]  # nothing is above the only value


def test_category_table() -> None:
    shown = tokens(
        "AABCC",
        [0.0, 0.2, 0.4, math.nan, 0.1],
        texts=["7", "7", "+", "the", "so"],
        reverse_kl=[1, 2, 3, 4, 5],
    )
    rows = {row.name: row for row in category_table(shown)}
    computation = rows["Computation"]
    assert (computation.count, computation.examples) == (3, ["7", "+"])
    assert computation.zones == pytest.approx({"A": 2 / 3, "B": 1 / 3, "C": 0.0})
    assert (computation.forward_kl, computation.reverse_kl) == pytest.approx((0.2, 2.0))
    assert math.isnan(rows["Other"].forward_kl) and rows["Other"].reverse_kl == 4.0
    assert rows["Strategy fork"].count == 0 and math.isnan(rows["Strategy fork"].zones["A"])
    assert sum(row.count for row in rows.values()) == 5


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/first", "/runs/second"], ["first", "second"]),
        (["/runs/sead/seed_1", "/runs/opd/seed_1"], ["sead", "opd"]),
        (["/runs/a/seed_1", "/runs/a/seed_2", "/runs/b/seed_1"], ["a/seed_1", "a/seed_2", "b/seed_1"]),
        (["/runs/x", "/runs/x/x"], ["/runs/x", "/runs/x/x"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert distinct_names([Path(path) for path in paths]) == names
