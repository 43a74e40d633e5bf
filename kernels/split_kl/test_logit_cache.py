"""Kept logits change what is computed again, and no bit of any result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import LogitCache, TileOptions, split_kl_loss, tile_loop
from sead_kernels.split_kl.testing import make_problem
from torch import Tensor
from torch.nn import Parameter

# 13 active rows and a vocabulary of 2901 in tiles of 7 x 1000: 4 or 3 KB a row, 0.29 MiB for everything.
OPTIONS = {"tokens": 7, "vocab": 1000}


def run(options: TileOptions) -> tuple[Tensor, Tensor, Tensor]:
    problem = make_problem(valid=2901, padded=2944)
    weight, hidden = Parameter(problem.student_weight), problem.student_hidden.requires_grad_()
    loss = split_kl_loss(
        hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels, problem.coefficients,
        shard=problem.shard(), tp_group=None, options=options,
    ).loss  # fmt: skip
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and weight.grad is not None
    first = loss.detach(), hidden.grad.clone(), weight.grad.clone()
    # A second backward pass finds nothing kept and computes the logits again.
    loss.backward()
    assert torch.equal(hidden.grad, 2 * first[1]) and torch.equal(weight.grad, 2 * first[2])
    return first


@pytest.fixture
def gemms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply-adds of every GEMM that makes logits."""
    counted: list[int] = []
    original = tile_loop.matmul

    def count(left: Tensor, right: Tensor, out: Tensor) -> None:
        counted.append(out.numel() * left.shape[1])
        original(left, right, out)

    monkeypatch.setattr(tile_loop, "matmul", count)
    return counted


@pytest.mark.parametrize("all_fit", [True, False])
def test_gradients_are_bitwise_those_without_a_cache(
    tiles: TileOptions, all_fit: bool, monkeypatch: pytest.MonkeyPatch, gemms: list[int]
) -> None:
    options = replace(tiles, **OPTIONS)
    expected = run(options)
    without = sum(gemms)
    gemms.clear()
    if not all_fit:
        monkeypatch.setattr(LogitCache, "__init__", small_cache)
    actual = run(replace(options, cache_mib=1))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    if tiles.backend == "torch":
        assert sum(gemms) == without, "the torch kernels destroy their tiles"
    elif all_fit:
        assert sum(gemms) == without * 2 // 3, "pass 1 and the second backward pass of three passes"
    else:
        assert without * 2 // 3 < sum(gemms) < without


def small_cache(cache: LogitCache, mebibytes: int) -> None:
    """A third of what there is: a budget below one MiB cannot be asked for."""
    cache._bytes_left = 100_000
    cache._tiles = {}


def test_the_budget_is_kept() -> None:
    cache = LogitCache(1)
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    # Two tiles of 100 rows x 1008 (with the spare columns) x 4 bytes are 0.77 MiB.
    assert cache.reserve(slice(0, 1000), slice(0, 100), **place) is not None
    assert cache.reserve(slice(1000, 2000), slice(0, 100), **place) is None
    assert cache.reserve(slice(1000, 1100), slice(0, 100), **place) is not None
    assert cache.take(slice(0, 1000), slice(0, 100)) is not None
    assert cache.take(slice(0, 1000), slice(0, 100)) is None
    with pytest.raises(ValueError, match=r"TileOptions.cache_mib is -1, wanted >= 0"):
        TileOptions(cache_mib=-1)
