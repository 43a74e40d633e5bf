"""The sampler tap of vLLM's model runner V2, driven through vLLM's interface as the runner drives it.

The slots, lengths and contexts are vLLM's own classes; only their tensors on a device are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from sead_megatron.rollout.sampler_tap import SamplerTapV2
from sead_megatron.rollout.tap_recorder import RECORDER, REQUEST_KEY, TappedRows
from tests.tapped import entropy, logits, recorded

SLOTS = 4


class Runner:
    """Keeps slots as vLLM's `RequestState` does: a free list, prompt and prefill lengths, recycled in place."""

    def __init__(self) -> None:
        self._free = list(range(SLOTS))
        self._slots: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.prompt_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        self.prefill_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        self.max_num_reqs = SLOTS
        self.tap = SamplerTapV2(None, self)

    def add(self, name: str, request: int | None, prompt: int, prefill: int | None = None) -> bool:
        """Gives a request a slot; `prefill` is longer than the prompt when a preempted request comes back."""
        slot = self._slots[name] = self._free.pop()
        self.prompt_len.np[slot] = prompt
        self.prefill_len.np[slot] = prefill or prompt
        self._seen[name] = 0
        extra = None if request is None else {REQUEST_KEY: request}
        return self.tap.add_request(slot, SimpleNamespace(extra_args=extra))

    def remove(self, name: str) -> None:
        """vLLM tells the processor nothing: the slot is free, and still holds what it held."""
        self._free.append(self._slots.pop(name))

    def step(self, rows: Sequence[tuple[str, int, float]], padding: int = 0) -> torch.Tensor:
        """One forward pass over rows (name, tokens of this step, value of the logits), in this order."""
        slots = np.array([self._slots[name] for name, _, _ in rows], dtype=np.int32)
        for name, tokens, _ in rows:
            self._seen[name] += tokens
        lengths = np.array([self._seen[name] for name, _, _ in rows] + [0] * padding, dtype=np.int32)
        given = logits(*(value for _, _, value in rows))
        before = given.clone()
        out = self.tap.apply(given, _context(slots, lengths))
        assert out is given and torch.equal(given, before)
        return out


def _context(slots: np.ndarray, lengths: np.ndarray) -> LogitsContext:
    on_device = torch.from_numpy(slots)
    return LogitsContext(
        expanded_idx_mapping=on_device,
        idx_mapping=on_device,
        idx_mapping_np=slots,
        expanded_local_pos=torch.zeros_like(on_device),
        input_ids=torch.zeros_like(on_device),
        pos=torch.from_numpy(lengths[: len(slots)] - 1),
        seq_lens_upper_bound_np=lengths,
    )


@pytest.fixture
def runner() -> Iterator[Runner]:
    RECORDER.start(1.0, 1.0)
    yield Runner()
    RECORDER.start(1.0, 1.0)


def test_it_is_what_vllm_loads(runner: Runner) -> None:
    """vLLM refuses any other class at the start of the engine."""
    assert issubclass(SamplerTapV2, LogitsProcessor)
    assert runner.add("a", 0, 3) and not runner.add("b", None, 3)


def test_positions_count_from_the_prompt(runner: Runner) -> None:
    runner.add("a", 10, 3)
    runner.add("b", 11, 5)
    runner.step([("a", 3, 1.0), ("b", 5, 2.0)], padding=6)
    runner.step([("a", 1, 3.0), ("b", 1, 4.0)], padding=6)
    assert recorded() == {
        10: pytest.approx([entropy(1.0), entropy(3.0)]),
        11: pytest.approx([entropy(2.0), entropy(4.0)]),
    }


def test_rows_are_reordered_in_every_step(runner: Runner) -> None:
    for request, name in enumerate("abc"):
        runner.add(name, request, 2)
    runner.step([("c", 2, 3.0), ("a", 2, 1.0), ("b", 2, 2.0)])
    runner.step([("b", 1, 5.0), ("c", 1, 6.0)])  # `a` is not scheduled
    runner.step([("a", 1, 4.0)])
    assert recorded() == {
        0: pytest.approx([entropy(1.0), entropy(4.0)]),
        1: pytest.approx([entropy(2.0), entropy(5.0)]),
        2: pytest.approx([entropy(3.0), entropy(6.0)]),
    }


def test_chunks_of_a_prompt_sample_nothing(runner: Runner) -> None:
    """A row of a piece of a prompt has logits, and a token that vLLM throws away."""
    runner.add("a", 0, 10)
    runner.add("b", 1, 2)
    runner.step([("a", 4, 7.0), ("b", 2, 1.0)])
    runner.step([("a", 4, 8.0), ("b", 1, 2.0)])
    runner.step([("a", 2, 3.0), ("b", 1, 4.0)])
    assert recorded() == {
        0: pytest.approx([entropy(3.0)]),
        1: pytest.approx([entropy(1.0), entropy(2.0), entropy(4.0)]),
    }


def test_a_preempted_request_is_prefilled_with_its_response(runner: Runner) -> None:
    """Pieces of the response so far are recomputed: their rows must not replace what was sampled from."""
    runner.add("a", 0, 4)
    runner.step([("a", 4, 1.0)])
    runner.step([("a", 1, 2.0)])
    runner.step([("a", 1, 3.0)])
    runner.remove("a")
    runner.add("a", 0, 4, prefill=7)
    runner.step([("a", 6, 9.0)])
    runner.step([("a", 1, 5.0)])
    assert recorded() == {0: pytest.approx([entropy(value) for value in (1.0, 2.0, 3.0, 5.0)])}


def test_a_slot_is_given_to_another_request(runner: Runner) -> None:
    """Also to one that is not tapped: nothing may be recorded for the old one then."""
    runner.add("a", 0, 2)
    runner.step([("a", 2, 1.0)])
    runner.remove("a")
    runner.add("b", 5, 3)
    runner.step([("b", 3, 2.0)])
    runner.remove("b")
    runner.add("c", None, 1)
    runner.add("d", 6, 1)
    runner.step([("c", 1, 9.0), ("d", 1, 4.0)])
    assert recorded() == {
        0: pytest.approx([entropy(1.0)]),
        5: pytest.approx([entropy(2.0)]),
        6: pytest.approx([entropy(4.0)]),
    }


def test_a_row_past_the_stop_token_is_left_out(runner: Runner) -> None:
    """Asynchronous scheduling samples once more before it sees that the request has ended."""
    runner.add("a", 0, 2)
    runner.step([("a", 2, 1.0)])
    runner.step([("a", 1, 2.0)])
    runner.step([("a", 1, 9.0)])
    rows = RECORDER.rows().of_response(0, 2)
    assert rows[:, 0].tolist() == pytest.approx([entropy(1.0), entropy(2.0)])


def test_a_missing_position_is_an_error(runner: Runner) -> None:
    runner.add("a", 3, 2)
    runner.step([("a", 2, 1.0)])
    with pytest.raises(RuntimeError, match=r"saw positions \[0\] of response 3, which has 2 tokens"):
        RECORDER.rows().of_response(3, 2)
    with pytest.raises(RuntimeError, match=r"saw positions \[\] of response 4"):
        RECORDER.rows().of_response(4, 1)


def test_several_rows_of_a_request_are_refused(runner: Runner) -> None:
    """Under speculative decoding a request has a row for each drafted token."""
    runner.add("a", 0, 2)
    slots = np.array([runner._slots["a"]], dtype=np.int32)
    with pytest.raises(RuntimeError, match="2 rows of 1 requests: speculative decoding is on"):
        runner.tap.apply(logits(1.0, 2.0), _context(slots, np.array([2], dtype=np.int32)))


def test_other_than_float32_is_refused(runner: Runner) -> None:
    runner.add("a", 0, 2)
    slots = np.array([runner._slots["a"]], dtype=np.int32)
    with pytest.raises(RuntimeError, match=r"torch\.bfloat16 logits"):
        runner.tap.apply(logits(1.0).bfloat16(), _context(slots, np.array([2], dtype=np.int32)))


def test_nothing_is_measured_of_a_batch_without_tapped_requests(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation and training share the engine; statistics cost a pass over the vocabulary."""
    monkeypatch.setattr("sead_megatron.rollout.tap_recorder._statistics", _must_not_run)
    runner.add("a", None, 2)
    runner.add("b", 1, 5)
    runner.step([("a", 2, 1.0), ("b", 3, 1.0)])
    assert recorded() == {}


def _must_not_run(*arguments: Any) -> None:
    raise AssertionError("statistics of a batch of which nothing is wanted")


def test_rows_dealt_over_ranks_are_merged() -> None:
    """Batch-sharded sampling: each tensor-parallel rank sees the rows of some requests, in its own order."""
    parts = []
    for requests, positions in (([2, 0], [0, 0]), ([1, 1], [1, 0])):
        RECORDER.start(1.0, 1.0)
        values = [request + position / 2 for request, position in zip(requests, positions, strict=True)]
        RECORDER.record(np.array(requests), np.array(positions), logits(*values))
        parts.append(RECORDER.rows())
    RECORDER.start(1.0, 1.0)
    merged = TappedRows.merged(parts)
    assert merged.of_response(0, 1)[:, 0].tolist() == pytest.approx([entropy(0.0)])
    assert merged.of_response(1, 2)[:, 0].tolist() == pytest.approx([entropy(1.0), entropy(1.5)])
    assert merged.of_response(2, 1)[:, 0].tolist() == pytest.approx([entropy(2.0)])
