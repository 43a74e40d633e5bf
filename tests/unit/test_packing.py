import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sead_megatron.data.packing import PackedRow, assign_to_replicas, build_row, pack_rows
from sead_megatron.data.types import Rollout, TokenTable

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def make_rollouts(sizes: list[tuple[int, int]]) -> list[Rollout]:
    """Rollouts of (prompt, response) sizes whose token ids are all different."""
    ids = itertools.count(1)
    return [
        Rollout(
            prompt_index=i,
            prompt_ids=np.array([next(ids) for _ in range(prompt)], dtype=np.int32),
            response_ids=np.array([next(ids) for _ in range(response)], dtype=np.int32),
            logprobs=np.zeros(response, dtype=np.float32),
            entropies=np.zeros(response, dtype=np.float32),
            finished=True,
            weight_version=0,
        )
        for i, (prompt, response) in enumerate(sizes)
    ]


def rows_of(rollouts: list[Rollout], rows: list[list[int]], pad_multiple: int) -> list[PackedRow]:
    offsets = TokenTable.from_rollouts(rollouts, "cpu").offsets
    return [build_row(row, rollouts, offsets, pad_multiple) for row in rows]


def test_longest_first_to_the_emptiest_replica() -> None:
    # 8 -> r0, 7 -> r1, 6 -> r2, 5 -> r2 (6), 4 -> r1 (7), 3 -> r0 (8), 2 -> r0 (11, fewest at equal load r0
    # r1 r2)
    assert assign_to_replicas([2, 3, 4, 5, 6, 7, 8], 3) == [[0, 1, 6], [2, 5], [3, 4]]
    assert assign_to_replicas([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert assign_to_replicas([3], 2) == [[0], []]
    assert assign_to_replicas([], 2) == [[], []]
    assert assign_to_replicas([4, 0, 0, 0], 3) == [[0], [1, 3], [2]]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8))
def test_replicas_share_the_sequences_evenly(lengths: list[int], num_replicas: int) -> None:
    replicas = assign_to_replicas(lengths, num_replicas)
    assert sorted(itertools.chain(*replicas)) == list(range(len(lengths)))
    assert all(replica == sorted(replica) for replica in replicas)
    assert len(replicas) == num_replicas and (len(lengths) < num_replicas or all(replicas))
    loads = [sum(lengths[i] for i in replica) for replica in replicas]
    # Whatever the last sequence was put on, it was the emptiest: no load exceeds the mean by more than one
    # sequence.
    assert max(loads) <= sum(lengths) / num_replicas + max(lengths, default=0)


@pytest.mark.parametrize(("lengths", "num_replicas"), [([1], 0), ([1, -1], 2)])
def test_replicas_refuse(lengths: list[int], num_replicas: int) -> None:
    with pytest.raises(ValueError, match=r"positive|negative"):
        assign_to_replicas(lengths, num_replicas)


def test_best_fit_decreasing_by_hand() -> None:
    # 7 | 6 | 4 beside 6 (room 4 fits exactly, row of 7 has 3) | 3 beside 7 | 2 opens a row
    assert pack_rows([4, 2, 7, 3, 6], range(5), 10, True) == [[0, 4], [1], [2, 3]]
    # 1 goes into the fuller row (5 + 4, room 1), not into the first one with room (7, room 3)
    assert pack_rows([7, 5, 4, 1], range(4), 10, True) == [[0], [1, 2, 3]]
    assert pack_rows({3: 5, 8: 5, 9: 5}, [9, 3, 8], 10, True) == [[3, 8], [9]]
    assert pack_rows({3: 5, 8: 5, 9: 5}, [9, 3, 8], 10, False) == [[3], [8], [9]]
    assert pack_rows([], [], 10, True) == []


@settings(deadline=None)
@given(LENGTHS, st.integers(40, 100))
def test_rows_hold_every_sequence_once_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    rows = pack_rows(lengths, range(len(lengths)), max_tokens, True)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(load <= max_tokens for load in loads)
    # No two rows could be one: each opened because nothing else had room for its first sequence.
    assert all(a + b > max_tokens for a, b in itertools.combinations(loads, 2))
    assert rows == sorted(rows) and all(row == sorted(row) for row in rows)


@pytest.mark.parametrize("packing", [True, False])
def test_a_sequence_longer_than_a_row_is_refused(packing: bool) -> None:
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens, a row holds 10"):
        pack_rows([10, 11], [0, 1], 10, packing)


def test_row_by_hand() -> None:
    rollouts = make_rollouts([(2, 3), (1, 0), (3, 1)])  # ids 1 2 | 3 4 5, 6, 7 8 9 | 10
    (row,) = rows_of(rollouts, [[0, 1, 2]], 4)
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 1]]
    assert row.cu_seqlens.tolist() == [0, 5, 6, 10, 12] and row.cu_seqlens.dtype == torch.int32
    assert row.max_seqlen == 5
    assert row.logit_rows.tolist() == [1, 2, 3, 8]
    assert row.labels.tolist() == [3, 4, 5, 10]
    assert row.token_index.tolist() == [0, 1, 2, 3]
    (alone,) = rows_of(rollouts, [[2]], 1)
    assert (alone.cu_seqlens.tolist(), alone.logit_rows.tolist(), alone.token_index.tolist()) == (
        [0, 4],
        [2],
        [3],
    )


def test_padding_longer_than_every_sequence_counts_in_max_seqlen() -> None:
    (row,) = rows_of(make_rollouts([(1, 1)]), [[0]], 8)
    assert row.cu_seqlens.tolist() == [0, 2, 8] and row.max_seqlen == 6


def test_a_row_without_sequences_is_padding() -> None:
    (row,) = rows_of(make_rollouts([(1, 1)]), [[]], 4)
    assert row.tokens.tolist() == [[0, 0, 0, 0]] and row.position_ids.tolist() == [[0, 1, 2, 3]]
    assert row.cu_seqlens.tolist() == [0, 4] and row.max_seqlen == 4
    for column in (row.logit_rows, row.labels, row.token_index):
        assert column.shape == (0,) and column.dtype == torch.int64


def test_a_row_without_responses_has_no_label() -> None:
    (row,) = rows_of(make_rollouts([(3, 0)]), [[0]], 1)
    assert row.tokens.shape == (1, 3) and row.labels.shape == (0,) and row.labels.dtype == torch.int64


def test_pad_multiple_is_positive() -> None:
    with pytest.raises(ValueError, match="pad_multiple must be positive"):
        rows_of(make_rollouts([(1, 1)]), [[0]], 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=12),
    st.integers(24, 60),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_round_trip_of_every_response_token(
    sizes: list[tuple[int, int]], max_tokens: int, pad_multiple: int, packing: bool
) -> None:
    rollouts = make_rollouts(sizes)
    packed = pack_rows([rollout.length for rollout in rollouts], range(len(rollouts)), max_tokens, packing)
    rows = rows_of(rollouts, packed, pad_multiple)
    responses = [int(token) for rollout in rollouts for token in rollout.response_ids]
    contexts = [
        [int(token) for token in [*rollout.prompt_ids, *rollout.response_ids[:position]]]
        for rollout in rollouts
        for position in range(len(rollout.response_ids))
    ]
    seen = []
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        assert (
            row.tokens.shape == row.position_ids.shape == (1, bounds[-1]) and bounds[-1] % pad_multiple == 0
        )
        assert row.max_seqlen == max(stop - start for start, stop in itertools.pairwise(bounds))
        columns = (row.logit_rows.tolist(), row.labels.tolist(), row.token_index.tolist())
        for position, label, index in zip(*columns, strict=True):
            start = max(bound for bound in bounds if bound <= position)
            stop = min(bound for bound in bounds if bound > position)
            assert position + 1 < stop  # the predicted token is in the same segment
            assert int(row.tokens[0, position + 1]) == label == responses[index]
            assert row.tokens[0, start : position + 1].tolist() == contexts[index]
            assert int(row.position_ids[0, position]) == position - start
            seen.append(index)
    assert sorted(seen) == list(range(len(responses)))
