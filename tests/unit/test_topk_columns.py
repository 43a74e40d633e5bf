"""Columns of top-k lists against plain loops, in float64 and float32, with padding and a temperature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import TileOptions, VocabShard, finalize, linear_stats

from sead_megatron.training.token_loss import LossContext
from sead_megatron.training.topk_columns import (
    ARGMAX_COLUMNS,
    TOPK_COLUMNS,
    argmax_columns,
    topk_columns,
)
from tests.objective_world import VOCABULARY, make_world


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_columns(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    world = make_world()
    scaled = replace(world, student=world.student / temperature, teacher=world.teacher / temperature)
    expected = scaled.list_columns(k=3)
    rows = VOCABULARY + 3  # of the output layer, padding with a large value included
    identity = torch.zeros(rows, VOCABULARY, dtype=dtype)
    identity[:VOCABULARY] = torch.eye(VOCABULARY, dtype=dtype)
    identity[VOCABULARY:] = 50.0
    context = LossContext(
        VocabShard(start=0, valid=VOCABULARY),
        None,
        temperature,
        TileOptions(backend="torch", tokens=8, vocab=4),
    )
    pair = (world.student.to(dtype), identity, world.teacher.to(dtype), identity)
    stats = finalize(
        linear_stats(
            *pair, world.labels, shard=context.shard, temperature=temperature, options=context.options
        )
    )
    columns = topk_columns(*pair, stats, 3, context)
    assert set(columns) == set(TOPK_COLUMNS)
    for name in TOPK_COLUMNS:
        torch.testing.assert_close(columns[name].double(), expected[name], rtol=tolerance, atol=tolerance)
    columns, table = argmax_columns(*pair, context), scaled.table()
    assert set(columns) == set(ARGMAX_COLUMNS)
    for name in ARGMAX_COLUMNS:
        torch.testing.assert_close(columns[name], table.require(name), rtol=1e-5, atol=1e-5)


def test_a_flat_teacher_has_the_whole_list_as_its_head() -> None:
    world = make_world()
    flat = replace(world, teacher=torch.zeros_like(world.teacher))
    q = flat.student.softmax(-1)
    expected = (q[:, :3] - 1 / VOCABULARY).abs().sum(-1)  # ties go to the smaller id
    context = LossContext(VocabShard(start=0, valid=VOCABULARY), None, 1.0, TileOptions(backend="torch"))
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    pair = (flat.student, identity, flat.teacher, identity)
    stats = finalize(linear_stats(*pair, flat.labels, shard=context.shard, options=context.options))
    head = topk_columns(*pair, stats, 3, context)["gap_head"]
    torch.testing.assert_close(head.double(), expected, rtol=1e-6, atol=1e-6)
