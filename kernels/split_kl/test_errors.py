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
    with pytest.raises(ValueError, match=r"temperature is 0\.0, wanted > 0"):
        linear_stats(*problem.inputs(), shard=problem.shard(), temperature=0.0)
    with pytest.raises(ValueError, match=r"VocabShard.valid is 0, wanted >= 1"):
        VocabShard(0, 0)
    with pytest.raises(ValueError, match=r"TileOptions.vocab is 0, wanted >= 1"):
        TileOptions(vocab=0)


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
    with pytest.raises(ValueError, match=rf"{name} has shape .*, wanted 19 rows like student_hidden"):
        split_kl_loss(*problem.inputs(), problem.coefficients, shard=problem.shard(), tp_group=None)


class Absent(TorchTiles):
    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return f"no {device} build; pip install absent"


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
