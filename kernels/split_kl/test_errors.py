"""Wrong calls name the argument, what it is and what it should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    split_kl_loss,
)
from sead_kernels.split_kl.testing import make_problem, merged_state
from sead_kernels.split_kl.tile_loop import TiledBackend
from sead_kernels.split_kl.torch_tiles import TorchTiles


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"student_hidden": torch.zeros(19, 15)},
            r"student_weight is .*\(128, 16\), wanted shape \(\*, 15\)",
        ),
        ({"teacher_weight": torch.zeros(64, 24)}, r"teacher_weight is .*\(64, 24\), wanted 128 rows"),
        ({"teacher_hidden": torch.zeros(18, 24)}, r"teacher_hidden is .*\(18, 24\), wanted 19 rows"),
        ({"student_hidden": torch.zeros(1, 19, 16)}, r"student_hidden is .*\(1, 19, 16\), wanted .* matrix"),
        (
            {"student_hidden": torch.zeros(16, 19).t()},
            r"student_hidden has strides \(1, 19\), wanted a contiguous",
        ),
        (
            {"teacher_weight": torch.zeros(24, 128).t()},
            r"teacher_weight has strides \(1, 128\), wanted a contiguous",
        ),
        (
            {"student_weight": torch.zeros(128, 16).double()},
            r"student_weight is torch.float64 on cpu, wanted torch.float32",
        ),
        (
            {"labels": torch.zeros(19, dtype=torch.int32)},
            r"labels is int32 of .*, wanted int64 of shape \(19,\)",
        ),
        (
            {"labels": torch.zeros(18, dtype=torch.int64)},
            r"labels is .*\(18,\) on cpu, wanted int64 of shape \(19,\)",
        ),
        ({"labels": torch.full((19,), 117)}, r"labels lie in \[117, 117\], wanted \[0, 117\)"),
        ({"labels": torch.full((19,), -1)}, r"labels lie in \[-1, -1\], wanted \[0, 117\)"),
    ],
)
def test_wrong_tensor(change: dict[str, Any], message: str) -> None:
    problem = replace(make_problem(), **change)
    with pytest.raises(ValueError, match=message):
        linear_stats(*problem.inputs(), shard=problem.shard())


def test_wrong_scalars() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match=r"topk is 118, wanted 0 <= topk <= 117"):
        linear_entropy(
            problem.student_hidden, problem.student_weight, problem.labels, shard=problem.shard(), topk=118
        )
    with pytest.raises(ValueError, match=r"topk is 129, wanted 0 <= topk <= 128: .* kernels keep up to 128"):
        hidden, weight, labels = torch.zeros(1, 2), torch.zeros(200, 2), torch.tensor([0])
        linear_entropy(hidden, weight, labels, shard=VocabShard(0, 200), topk=129)
    for temperature in (float("inf"), float("nan"), 1e-40):
        with pytest.raises(ValueError, match=rf"temperature is {temperature}, wanted > 0 \(1e-6 to 1e6\)"):
            linear_stats(*problem.inputs(), shard=problem.shard(), temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature is 0\.0, wanted > 0"):
        linear_stats(*problem.inputs(), shard=problem.shard(), temperature=0.0)
    with pytest.raises(ValueError, match=r"VocabShard.valid is 0, wanted >= 1"):
        VocabShard(0, 0)
    with pytest.raises(ValueError, match=r"TileOptions.vocab is 0, wanted >= 1"):
        TileOptions(vocab=0)


@pytest.mark.parametrize("field", ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_found_on_request(field: str, value: float) -> None:
    problem = make_problem()
    getattr(problem, field)[3, 5] = value
    checked = TileOptions(check_finite=True)
    with pytest.raises(
        ValueError, match=rf"{field} has 1 non-finite values, .* at row 3, column 5; wanted finite"
    ):
        linear_stats(*problem.inputs(), shard=problem.shard(), options=checked)
    if field.startswith("teacher"):
        with pytest.raises(ValueError, match=r"has 1 non-finite values"):
            linear_entropy(
                problem.teacher_hidden,
                problem.teacher_weight,
                problem.labels,
                shard=problem.shard(),
                options=checked,
            )
    linear_stats(*make_problem().inputs(), shard=problem.shard(), options=checked)


def test_unchecked_nan_reaches_its_tokens_numbers_and_no_others(tiles: TileOptions) -> None:
    """Nothing turns it into a number: a step with it is skipped by the trainer, not taken with wrong weights."""
    problem = make_problem()
    problem.student_hidden[4, 2] = float("nan")
    stats = finalize(linear_stats(*problem.inputs(), shard=problem.shard(), options=tiles))
    for name in ("student_lse", "student_entropy", "forward_kl", "reverse_kl", "student_logprob"):
        assert getattr(stats, name).isnan().nonzero()[:, 0].tolist() == [4], name
    assert not stats.teacher_entropy.isnan().any()


def test_wrong_gradient_arguments() -> None:
    problem = make_problem()
    stats = finalize(merged_state(problem, 1))
    with pytest.raises(
        ValueError, match=r"coefficients is float32 of shape \(19, 3\), wanted float32 of shape \(19, 4\)"
    ):
        linear_split_kl_grads(*problem.inputs(), stats, torch.zeros(19, 3), shard=problem.shard())
    with pytest.raises(
        ValueError, match=r"weight_grad is float32 of shape \(3, 16\), wanted shape \(128, 16\)"
    ):
        linear_split_kl_grads(
            *problem.inputs(),
            stats,
            problem.coefficients,
            shard=problem.shard(),
            weight_grad=torch.zeros(3, 16),
        )
    with pytest.raises(
        ValueError, match=r"weight_grad is torch.int64 on cpu, wanted a floating-point tensor"
    ):
        linear_split_kl_grads(
            *problem.inputs(),
            stats,
            problem.coefficients,
            shard=problem.shard(),
            weight_grad=torch.zeros(128, 16, dtype=torch.int64),
        )
    with pytest.raises(
        ValueError, match=r"stats.student_lse is float32 of shape \(18,\), wanted shape \(19,\)"
    ):
        short = type(stats)(*(value[:18] for value in stats))
        linear_split_kl_grads(*problem.inputs(), short, problem.coefficients, shard=problem.shard())


@pytest.mark.parametrize("name", ["teacher_hidden", "labels"])
def test_loss_checks_rows_before_it_selects_them(name: str) -> None:
    """A longer tensor would select the right number of wrong rows."""
    problem = make_problem()
    change: dict[str, Any] = {name: torch.cat([getattr(problem, name)] * 2)}
    problem = replace(problem, **change)
    with pytest.raises(ValueError, match=rf"{name} .*, wanted 19 rows like student_hidden"):
        split_kl_loss(*problem.inputs(), problem.coefficients, shard=problem.shard(), tp_group=None)


class Absent(TorchTiles):
    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return f"no {device} build; pip install absent"


def test_a_part_of_the_vocabulary_needs_its_group() -> None:
    """Alone it would be a softmax over fewer tokens, silently."""
    local, shard = make_problem().local(1, 2)
    message = r"student_weight has rows 64 to 128 of 117 \(shard.valid\), wanted all .* as tp_group"
    with pytest.raises(ValueError, match=message):
        split_kl_loss(*local.inputs(), local.coefficients, shard=shard, tp_group=None)


def test_layout_is_checked_before_rows_are_selected() -> None:
    """A transposed tensor must not pass as long as one row is inactive, whose removal copies the others."""
    problem = make_problem()
    problem = replace(problem, student_hidden=problem.student_hidden.t().contiguous().t())
    with pytest.raises(ValueError, match=r"student_hidden has strides \(1, 19\), wanted a contiguous tensor"):
        split_kl_loss(*problem.inputs(), problem.coefficients, shard=problem.shard(), tp_group=None)


def test_second_derivatives_are_refused() -> None:
    problem = make_problem()
    hidden = problem.student_hidden.requires_grad_()
    loss = split_kl_loss(*problem.inputs(), problem.coefficients, shard=problem.shard(), tp_group=None).loss
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match=r"options.backend is 'cutile', wanted one of \['auto', .*'torch'"):
        linear_stats(*problem.inputs(), shard=problem.shard(), options=TileOptions(backend="cutile"))
    absent = TiledBackend(Absent())
    monkeypatch.setitem(BACKENDS, "absent", absent)
    with pytest.raises(
        ValueError,
        match=r"'absent' is unavailable for torch.float32 on cpu: no cpu build; pip install absent; .*'torch'",
    ):
        linear_stats(*problem.inputs(), shard=problem.shard(), options=TileOptions(backend="absent"))
