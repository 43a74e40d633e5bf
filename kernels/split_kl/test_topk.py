"""The order of the streamed top-k: larger logit, then smaller id, on every backend, tile and shard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import MAX_TOPK, TileOptions, VocabShard, finalize_entropy, linear_entropy
from sead_kernels.split_kl.state import SENTINEL
from sead_kernels.split_kl.testing import Problem, make_problem, merged_entropy
from sead_kernels.split_kl.topk import NO_ID, decode_keys, encode_keys, largest
from torch import Tensor


def with_ties(seed: int = 0) -> Problem:
    """Small integers: logits are exact on every backend and few distinct ones exist."""
    generator = torch.Generator().manual_seed(seed)
    problem = make_problem()
    return replace(
        problem,
        teacher_hidden=torch.randint(-1, 2, (19, 24), generator=generator).float(),
        teacher_weight=torch.randint(-1, 2, (128, 24), generator=generator).float(),
    )


def expected(problem: Problem, topk: int) -> tuple[Tensor, Tensor]:
    logits = problem.teacher_hidden @ problem.teacher_weight[: problem.valid].t()
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :topk], ids[:, :topk]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("topk", [1, 5, 40, 117])
def test_ties_go_to_the_smaller_id(tiles: TileOptions, ranks: int, topk: int) -> None:
    """About 20 distinct logits among 117: ties inside a tile, over tiles of 24 and over shards of 32."""
    problem = with_ties()
    state = merged_entropy(problem, ranks, topk=topk, options=tiles)
    values, ids = expected(problem, topk)
    assert state.topk_ids is not None and state.topk_logits is not None
    assert torch.equal(state.topk_ids, ids)
    assert torch.equal(state.topk_logits, values)


def test_the_two_zeros_are_ties(tiles: TileOptions) -> None:
    weight = torch.tensor([[-0.0], [0.0], [1.0], [-0.0]])
    state = linear_entropy(
        torch.ones(1, 1), weight, torch.tensor([0]), shard=VocabShard(0, 4), topk=4, options=tiles
    )
    assert state.topk_ids is not None and state.topk_ids.tolist() == [[2, 0, 1, 3]]


def test_a_short_shard_fills_up_with_empty_slots(tiles: TileOptions) -> None:
    local, shard = with_ties().local(0, 4)
    inputs = (local.teacher_hidden, local.teacher_weight, local.labels)
    state = linear_entropy(*inputs, shard=shard, topk=40, options=tiles)
    assert state.topk_ids is not None and state.topk_logits is not None
    assert state.topk_ids.max(dim=1).values.eq(NO_ID).all() and state.topk_ids[:, :32].lt(32).all()
    assert state.topk_logits[:, 32:].eq(SENTINEL).all() and state.topk_ids[:, 32:].eq(NO_ID).all()


def test_topk_of_the_largest_size_over_many_tiles(tiles: TileOptions) -> None:
    """More candidates than the CUDA kernel's buffer of 1024 holds at once, in growing order: all are kept once."""
    vocabulary = 2300
    weight = torch.arange(vocabulary).float()[:, None]
    state = linear_entropy(
        torch.tensor([[1.0], [-1.0]]),
        weight,
        torch.tensor([0, 1]),
        shard=VocabShard(0, vocabulary),
        topk=MAX_TOPK,
        options=replace(tiles, vocab=2000),
    )
    assert state.topk_ids is not None
    assert state.topk_ids[0].tolist() == list(range(vocabulary - 1, vocabulary - 1 - MAX_TOPK, -1))
    assert state.topk_ids[1].tolist() == list(range(MAX_TOPK))


@pytest.mark.parametrize("ranks", [1, 4])
def test_gathered_logits(tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int) -> None:
    """Any ids in any order; those of padding, of no token and of other shards count as zero."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    ids = torch.randint(0, problem.valid, (19, 6), generator=torch.Generator().manual_seed(3))
    ids[0, :3] = torch.tensor([problem.valid, NO_ID, -1])
    total = torch.zeros(19, 6, dtype=torch.float64)
    for rank in range(ranks):
        local, shard = problem.local(rank, ranks)
        inputs = (local.student_hidden, local.student_weight, local.labels)
        state = linear_entropy(*inputs, shard=shard, temperature=0.7, gather_ids=ids, options=tiles)
        assert state.gathered is not None
        total += state.gathered
    logits = problem.student_hidden.double() @ problem.student_weight.double().t() / 0.7
    wanted = logits.gather(1, ids.clamp(0, problem.valid - 1))
    wanted[0, :3] = 0
    assert float((total - wanted).abs().max()) <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_support_logprobs_need_no_topk() -> None:
    problem = make_problem(dtype=torch.float64)
    ids = problem.labels[:, None]
    inputs = (problem.student_hidden, problem.student_weight, problem.labels)
    state = linear_entropy(*inputs, shard=problem.shard(), gather_ids=ids)
    stats = finalize_entropy(state, problem.valid)
    assert stats.support_logprobs is not None and stats.topk_ids is None
    torch.testing.assert_close(stats.support_logprobs[:, 0], stats.logprob, rtol=0, atol=1e-13)


def test_keys_sort_as_logits_and_ids_do() -> None:
    logits = torch.tensor([-1e30, -2.5, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3.0, 3.0, 1e30])
    ids = torch.tensor([NO_ID, 7, 2, 4, 9, 8, 1, 200000, 5, 0])
    keys = encode_keys(logits, ids)
    order = keys.argsort(descending=True).tolist()
    assert order == sorted(range(10), key=lambda i: (-float(logits[i]), int(ids[i])))
    decoded = decode_keys(keys)
    assert torch.equal(decoded[0], logits) and torch.equal(decoded[1], ids)


def test_largest_resolves_ties_at_the_cut() -> None:
    """More equal logits than fit: the smallest ids stay, whatever torch.topk would have taken."""
    logits = torch.zeros(2, 300)
    logits[0, 250] = 1
    values, ids = largest(logits, 4, first_id=1000)
    assert ids.tolist() == [[1250, 1000, 1001, 1002], [1000, 1001, 1002, 1003]]
    assert values.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
