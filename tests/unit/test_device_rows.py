"""Rows on the device: which tokens take part is known on the host, and the loss of a row reads nothing back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sead_kernels.split_kl import TileOptions, VocabShard, torch_tiles
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sead_megatron.data.terms import Divergence, Pointwise, Term, TopK
from sead_megatron.training.device_rows import ActiveRows, TeacherRows, check_labels
from sead_megatron.training.token_loss import LossContext, token_loss

CPU = torch.device("cpu")
ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 6, 8, 12, 40
# A NaN takes part: it must reach the loss, so that the step is skipped.
WEIGHTED = {
    0: {Term.FORWARD_KL: 0.5},
    2: {Term.ENTROPY: -1.0},
    3: {Term.REVERSE_KL: float("nan")},
    5: {Term.LOGPROB: 2.0},
}


def weights() -> Tensor:
    table = torch.zeros(ROWS, len(Term))
    for row, terms in WEIGHTED.items():
        for term, value in terms.items():
            table[row, term] = value
    return table


@pytest.mark.parametrize(
    "divergence, loss",
    [(None, [0, 2, 3, 5]), (TopK("tail", 4), [0, 2, 3, 5]), (Pointwise("jsd", 0.5), [0])],
)
def test_active_rows(divergence: Divergence | None, loss: list[int]) -> None:
    active = ActiveRows.of(weights() != 0, divergence, CPU)
    assert (active.loss.tolist(), active.divergence.tolist()) == (loss, [0, 3])


def test_labels_outside_the_vocabulary_are_refused() -> None:
    assert check_labels(torch.tensor([0, 39]), VOCABULARY).tolist() == [0, 39]
    check_labels(torch.empty(0, dtype=torch.int64), VOCABULARY)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=r"response tokens lie in \[.*\], the vocabulary is \[0, 40\)"):
            check_labels(torch.tensor([3, wrong]), VOCABULARY)


def run_without_values(
    divergence: Divergence | None, *, teacher: bool, argmax: bool, check_values: bool = False
) -> Any:
    """A row's loss and its backward pass with tensors that have shapes only: to want a value of one raises."""
    mode = FakeTensorMode()
    active = ActiveRows.of(weights() != 0, divergence, CPU)
    options = TileOptions(backend="torch", tokens=4, vocab=16, check_values=check_values)
    context = LossContext(VocabShard(0, VOCABULARY), None, 1.0, options)
    active = ActiveRows(mode.from_tensor(active.loss), mode.from_tensor(active.divergence))
    with mode:
        hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
        weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
        teacher_hidden = torch.randn(2 * ROWS, TEACHER_HIDDEN)
        output = torch.randn(VOCABULARY, TEACHER_HIDDEN)
        rows = TeacherRows(teacher_hidden, torch.arange(ROWS), output)
        result = token_loss(
            hidden,
            weight,
            rows.take(CPU) if teacher else None,
            torch.zeros(ROWS, dtype=torch.int64),
            torch.zeros(ROWS, len(Term)),
            active,
            divergence,
            context,
            teacher_argmax=argmax,
        )
        result.loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    return result


CASES: dict[str, dict[str, Any]] = {
    "both divergences": {"divergence": None, "teacher": True, "argmax": False},
    "no teacher": {"divergence": None, "teacher": False, "argmax": False},
    "pointwise": {"divergence": Pointwise("jsd", 0.5, clip=0.1), "teacher": True, "argmax": False},
    "top-k of the teacher": {"divergence": TopK("tail", 4), "teacher": True, "argmax": False},
    "top-k of both": {"divergence": TopK("tail", 4, "union"), "teacher": True, "argmax": False},
    "teacher's likeliest token": {"divergence": None, "teacher": True, "argmax": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_loss_of_a_row_reads_nothing_back(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The torch backend sorts ties of a top-k by looking for them; the native ones have kernels of their own.
    monkeypatch.setattr(torch_tiles, "largest", lambda logits, count, first_id: logits.topk(count, dim=1))
    result = run_without_values(**case)
    expected = 1 if isinstance(case["divergence"], Pointwise) else len(WEIGHTED)
    assert {len(column) for column in result.columns.values()} == {expected}


def test_checked_values_are_read_back() -> None:
    """The case above would not notice anything otherwise."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_without_values(**CASES["both divergences"], check_values=True)
