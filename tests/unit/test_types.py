from typing import Any

import numpy as np
import pytest
import torch

from sead_megatron.data.terms import Term, Zone
from sead_megatron.data.types import Coefficients, Prompt, Rollout, TokenTable


def make_rollout(prompt: list[int], response: list[int], first: float = 0.0, **changes: Any) -> Rollout:
    values = np.arange(len(response), dtype=np.float32) + np.float32(first)
    fields: dict[str, Any] = {
        "prompt_index": 0,
        "prompt_ids": np.array(prompt, dtype=np.int32),
        "response_ids": np.array(response, dtype=np.int32),
        "logprobs": -values,
        "entropies": values * 2,
        "finished": True,
        "weight_version": 3,
    }
    return Rollout(**(fields | changes))


def test_terms_are_the_columns_of_the_kernel() -> None:
    from sead_kernels.split_kl import COEFFICIENTS

    assert tuple(term.name.lower() for term in Term) == COEFFICIENTS
    assert [int(zone) for zone in (Zone.A, Zone.B, Zone.C)] == [0, 1, 2]


def test_a_prompt_has_tokens() -> None:
    with pytest.raises(ValueError, match="'p1' has no tokens"):
        Prompt(id="p1", messages=[], answer=None, domain=None, token_ids=())


def test_table_of_rollouts_is_in_rollout_order_with_the_engine_statistics() -> None:
    rollouts = [
        make_rollout([1], [5, 6, 7], first=1),
        make_rollout([1, 2], []),
        make_rollout([4], [9, 9], first=10),
    ]
    table = TokenTable.from_rollouts(rollouts, "cpu")
    assert table.offsets.tolist() == [0, 3, 3, 5]
    assert (table.num_rollouts, table.num_tokens) == (3, 5)
    assert table.rollout_logprob is not None and table.rollout_logprob.tolist() == [-1, -2, -3, -10, -11]
    assert table.student_entropy is not None and table.student_entropy.tolist() == [2, 4, 6, 20, 22]
    assert table.teacher_entropy is None and table.forward_kl is None
    assert [table.rollout_slice(i) for i in range(3)] == [slice(0, 3), slice(3, 3), slice(3, 5)]
    with pytest.raises(IndexError, match="rollout 3 of 3"):
        table.rollout_slice(3)
    assert [rollout.length for rollout in rollouts] == [4, 2, 3]


def test_masked_tokens_have_no_row() -> None:
    masked = make_rollout([1], [5, 6, 7, 8], first=1, trained=np.array([True, False, False, True]))
    table = TokenTable.from_rollouts([masked, make_rollout([4], [9])], "cpu")
    assert table.offsets.tolist() == [0, 2, 3] and table.require("rollout_logprob").tolist() == [-1, -4, 0]
    assert masked.trained_ids.tolist() == [5, 8] and masked.length == 5
    assert masked.as_read_by_teacher().trained_positions.tolist() == [0, 3]
    with pytest.raises(ValueError, match="4 response tokens and 2 trained"):
        make_rollout([1], [5, 6, 7, 8], trained=np.array([True, False]))


def test_table_of_nothing() -> None:
    table = TokenTable.from_rollouts([], "cpu")
    assert (table.num_rollouts, table.num_tokens) == (0, 0)
    assert table.student_entropy is not None and table.student_entropy.dtype == torch.float32


def test_with_columns_replaces_and_keeps() -> None:
    table = TokenTable.from_rollouts([make_rollout([1], [5, 6])], "cpu")
    scored = table.with_columns(
        teacher_entropy=torch.tensor([0.5, 0.25]), student_entropy=torch.tensor([1.0, 2.0])
    )
    assert scored.require("teacher_entropy").tolist() == [0.5, 0.25]
    assert scored.require("student_entropy").tolist() == [1.0, 2.0]
    assert scored.require("rollout_logprob").tolist() == [0.0, -1.0]
    assert table.teacher_entropy is None
    with pytest.raises(ValueError, match=r"no such columns: \['offsets', 'teacher'\]"):
        table.with_columns(teacher=torch.zeros(2), offsets=torch.zeros(2))
    with pytest.raises(ValueError, match="has no forward_kl"):
        table.require("forward_kl")


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 2], dtype=torch.int32), r"int64 \[S\+1\] on the CPU"),
        (torch.zeros(0, dtype=torch.int64), r"int64 \[S\+1\] on the CPU"),
        (torch.tensor([[0, 2]]), r"int64 \[S\+1\] on the CPU"),
        (torch.tensor([1, 2]), "start at 0"),
        (torch.tensor([0, 3, 2]), "never decrease"),
    ],
)
def test_table_refuses_offsets(offsets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTable(offsets=offsets)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), "forward_kl must be float32"),
        (torch.zeros(3), r"forward_kl must be float32 \[2\]"),
        (torch.zeros(2, 1), r"forward_kl must be float32 \[2\]"),
        (torch.zeros(2, requires_grad=True), "requires grad"),
        (torch.zeros(2, device="meta"), "is on meta"),
    ],
)
def test_table_refuses_columns(column: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTable(offsets=torch.tensor([0, 2]), student_entropy=torch.zeros(2), forward_kl=column)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": np.zeros(1, dtype=np.float32)}, "2 response tokens and 1 logprobs"),
        ({"entropies": np.zeros(3, dtype=np.float32)}, "2 response tokens and 3 entropies"),
        ({"entropies": np.zeros(2, dtype=np.float64)}, "entropies must be a 1-D float32"),
        ({"response_ids": np.zeros((2, 1), dtype=np.int32)}, "response_ids must be a 1-D int32"),
        ({"prompt_ids": np.zeros(0, dtype=np.int32)}, "empty prompt"),
    ],
)
def test_rollout_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rollout([1], [2, 3], **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.zeros(2, 3)}, r"float32 \[N, 4\]"),
        ({"weights": torch.zeros(2, 4, dtype=torch.float64)}, r"float32 \[N, 4\]"),
        ({"weights": torch.zeros(2, 4, requires_grad=True)}, "detached"),
        ({"normalizer": 0.0}, "finite and positive"),
        ({"normalizer": float("nan")}, "finite and positive"),
        ({"normalizer": float("inf")}, "finite and positive"),
        ({"zones": torch.zeros(3, dtype=torch.int8)}, r"zones must be int8 \[2\]"),
        ({"zones": torch.zeros(2, dtype=torch.int64)}, r"zones must be int8 \[2\]"),
    ],
)
def test_coefficients_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coefficients(**({"weights": torch.zeros(2, 4)} | {"normalizer": 1.0} | arguments))
