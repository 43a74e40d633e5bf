"""The sampler tap of vLLM's model runner V1 on hand-made batches: which request stands in which row, and what is
recorded of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from sead_megatron.rollout.sampler_tap import SamplerTapV1
from sead_megatron.rollout.tap_recorder import RECORDER, REQUEST_KEY
from tests.tapped import VOCABULARY, entropy, logits, recorded

ONE_WAY, SWAP = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP


@pytest.fixture
def tap() -> Iterator[SamplerTapV1]:
    RECORDER.start(1.0, 1.0)
    yield SamplerTapV1(None, torch.device("cpu"), False)
    RECORDER.start(1.0, 1.0)


def added(row: int, request: int | None, response: list[int]) -> tuple[int, Any, list[int], list[int]]:
    """An addition as vLLM announces it; None stands for a request that does not ask to be tapped."""
    extra = None if request is None else {REQUEST_KEY: request}
    return row, SimpleNamespace(extra_args=extra), [], response


def change(
    tap: SamplerTapV1,
    size: int,
    removed: Sequence[int] = (),
    added: Sequence[Any] = (),
    moved: Sequence[Any] = (),
) -> None:
    tap.update_state(
        BatchUpdate(batch_size=size, removed=list(removed), added=list(added), moved=list(moved))
    )


def test_the_tap_sees_greedy_requests_and_leaves_logits_alone(tap: SamplerTapV1) -> None:
    """vLLM skips argmax-invariant processors for greedy requests, so the tap must not call itself one."""
    change(tap, 1, added=[added(0, 5, [])])
    given = torch.randn(1, VOCABULARY)
    before = given.clone()
    assert tap.apply(given) is given and torch.equal(given, before)
    assert not tap.is_argmax_invariant()


@pytest.mark.parametrize(("scored", "sampled"), [(1.0, 0.7), (1.3, 0.0), (0.8, 1.0)])
def test_statistics_against_float64(tap: SamplerTapV1, scored: float, sampled: float) -> None:
    """Entropy and log-sum-exp at the loss' temperature, lse at 1 and at the sampling temperature (1 when greedy)."""
    RECORDER.start(scored, sampled)
    change(tap, 4, added=[added(i, i, []) for i in range(4)])
    given = 4 * torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tap.apply(given)
    for request in range(4):
        row = RECORDER.rows().of_response(request, 1)
        exact = given[request].double()
        logprobs = (exact / scored).log_softmax(-1)
        wanted = [
            -(logprobs.exp() * logprobs).sum(),
            exact.logsumexp(-1),
            (exact / scored).logsumexp(-1),
            (exact / (sampled or 1.0)).logsumexp(-1),
        ]
        np.testing.assert_allclose(row[0], [float(x) for x in wanted], rtol=1e-6, atol=1e-6)


def test_positions_follow_the_response(tap: SamplerTapV1) -> None:
    """The row of a step belongs to the position that vLLM's own response list has reached."""
    responses: list[list[int]] = [[], []]
    change(tap, 2, added=[added(0, 10, responses[0]), added(1, 11, responses[1])])
    tap.apply(logits(1.0, 2.0))
    responses[0].append(7)
    responses[1].append(7)
    tap.update_state(None)
    tap.apply(logits(3.0, 4.0))
    assert recorded() == {
        10: pytest.approx([entropy(1.0), entropy(3.0)]),
        11: pytest.approx([entropy(2.0), entropy(4.0)]),
    }


def test_requests_without_the_key_are_ignored(tap: SamplerTapV1) -> None:
    """Also when such a request takes the row of a tapped one."""
    change(tap, 2, added=[added(0, None, []), added(1, 4, [])])
    tap.apply(logits(1.0, 2.0))
    change(tap, 2, added=[added(1, None, [])])
    tap.apply(logits(3.0, 5.0))
    assert recorded() == {4: pytest.approx([entropy(2.0)])}


def test_removed_requests_are_forgotten(tap: SamplerTapV1) -> None:
    """A finished request's row may still be there when its slot is empty; nothing more is recorded of it."""
    change(tap, 2, added=[added(0, 0, []), added(1, 1, [])])
    tap.apply(logits(1.0, 2.0))
    change(tap, 1, removed=[1])
    tap.apply(logits(1.5, 9.0))
    assert recorded() == {0: pytest.approx([entropy(1.5)]), 1: pytest.approx([entropy(2.0)])}


def test_an_addition_takes_the_row_of_a_removed_request(tap: SamplerTapV1) -> None:
    """vLLM reports removals first, then additions into the freed rows."""
    change(tap, 1, added=[added(0, 0, [])])
    tap.apply(logits(1.0))
    change(tap, 1, removed=[0], added=[added(0, 8, [])])
    tap.apply(logits(2.0))
    assert recorded() == {0: pytest.approx([entropy(1.0)]), 8: pytest.approx([entropy(2.0)])}


def test_a_one_way_move_frees_its_source(tap: SamplerTapV1) -> None:
    """Condensing the batch: the last row moves into a hole, and its old row means nothing any more."""
    change(tap, 3, added=[added(i, i, []) for i in range(3)])
    change(tap, 2, removed=[0], moved=[(2, 0, ONE_WAY)])
    tap.apply(logits(1.0, 2.0, 3.0))
    assert recorded() == {1: pytest.approx([entropy(2.0)]), 2: pytest.approx([entropy(1.0)])}


def test_a_one_way_move_of_an_untapped_request_clears_its_target(tap: SamplerTapV1) -> None:
    """Otherwise the tapped request that stood there before would be given the other's logits."""
    change(tap, 2, added=[added(0, 0, []), added(1, None, [])])
    change(tap, 1, moved=[(1, 0, ONE_WAY)])
    tap.apply(logits(1.0))
    assert recorded() == {}


def test_a_swap_exchanges_rows(tap: SamplerTapV1) -> None:
    """Reordering the batch, also with a request that is not tapped."""
    change(tap, 3, added=[added(0, 0, []), added(1, 1, []), added(2, None, [])])
    change(tap, 3, moved=[(0, 1, SWAP), (1, 2, SWAP)])
    tap.apply(logits(1.0, 2.0, 3.0))
    assert recorded() == {1: pytest.approx([entropy(1.0)]), 0: pytest.approx([entropy(3.0)])}


def test_the_last_row_of_a_position_counts(tap: SamplerTapV1) -> None:
    """A prompt prefilled in pieces is sampled after every piece at response position 0; only the last is kept."""
    response: list[int] = []
    change(tap, 1, added=[added(0, 6, response)])
    tap.apply(logits(1.0))
    tap.apply(logits(2.0))
    tap.apply(logits(3.0))
    response.append(1)
    tap.apply(logits(4.0))
    assert recorded() == {6: pytest.approx([entropy(3.0), entropy(4.0)])}


def test_rows_beyond_the_batch_are_not_read(tap: SamplerTapV1) -> None:
    """A step may run a part of the batch; requests that did not run record nothing."""
    change(tap, 2, added=[added(0, 0, []), added(1, 1, [])])
    tap.apply(logits(1.0))
    assert recorded() == {0: pytest.approx([entropy(1.0)])}


def test_a_new_call_starts_empty(tap: SamplerTapV1) -> None:
    """Request ids are reused by the next call of generate."""
    change(tap, 1, added=[added(0, 0, [])])
    tap.apply(logits(1.0))
    RECORDER.start(1.0, 1.0)
    assert recorded() == {}
