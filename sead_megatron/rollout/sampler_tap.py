"""Reads full-vocabulary statistics out of vLLM's sampler, so that a step needs no second student forward.

Rollouts are sampled with the very weights that are about to be updated. A logits processor sees the float32
logits of every sampled position before temperature, hence the exact entropy of the student at every token.

vLLM has two model runners with an interface each (0.32 and 0.33): V2 is the default wherever Triton works, V1 what is
left on the CPU. `vllm_engine.choose_tap` picks the class that fits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from sead_megatron.rollout.tap_recorder import NOBODY, RECORDER, REQUEST_KEY


def _request_of(params: Any) -> int:
    """The number of a request that asks to be tapped, else `NOBODY`."""
    return int((params.extra_args or {}).get(REQUEST_KEY, NOBODY))


class SamplerTapV2(LogitsProcessorV2):
    """Records the statistics of each sampled position, for vLLM's model runner V2. The logits pass unchanged.

    A request lives in a slot, from `add_request` until the slot is given to another one. The rows of a batch are in
    any order, and name their slots.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._prompt_lengths = req_states.prompt_len
        self._prefill_lengths = req_states.prefill_len
        self._request_of_slot = np.full(req_states.max_num_reqs, NOBODY, dtype=np.int64)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes note of a slot's new request; True when it is tapped: vLLM skips `apply` for batches without any."""
        self._request_of_slot[req_idx] = request = _request_of(sampling_params)
        return request != NOBODY

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """`logits`: float32 [rows, vocabulary], before temperature; one row a request.

        Positions follow from lengths that the host knows, so nothing waits for the device; they are exact without
        speculative decoding. Raises RuntimeError when a request has several rows: that is speculative decoding.
        """
        slots = ctx.idx_mapping_np
        if len(logits) != len(slots):
            raise RuntimeError(
                f"the sampler tap was given {len(logits)} rows of {len(slots)} requests: speculative decoding is on"
            )
        # Tokens that the row has seen; beyond the requests the array is padding.
        lengths = ctx.seq_lens_upper_bound_np[: len(slots)].astype(np.int64)
        positions = lengths - self._prompt_lengths.np[slots]
        # A row that ends inside of what is prefilled (the prompt; after a preemption the response so far too) samples
        # nothing that counts.
        positions[lengths < self._prefill_lengths.np[slots]] = NOBODY
        RECORDER.record(self._request_of_slot[slots], positions, logits)
        return logits


class SamplerTapV1(LogitsProcessor):
    """Records the statistics of each sampled position, for vLLM's model runner V1. The logits pass unchanged."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        # Batch row -> (request, its response so far: a list that vLLM goes on appending to).
        self._request_of_row: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """False, although true: vLLM skips argmax-invariant processors for greedy requests."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests as vLLM adds them to, removes them from and moves them within its batch."""
        if batch_update is None:
            return
        rows = self._request_of_row
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, _, response in batch_update.added:
            rows.pop(row, None)
            request = _request_of(params)
            if request != NOBODY:
                rows[row] = (request, response)
        for source, target, direction in batch_update.moved:
            moved, displaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = displaced

    def apply(self, logits: Tensor) -> Tensor:
        """`logits`: float32 [batch rows, vocabulary], before temperature."""
        requests = np.full(len(logits), NOBODY, dtype=np.int64)
        positions = np.full(len(logits), NOBODY, dtype=np.int64)
        for row, (request, response) in self._request_of_row.items():
            if row < len(logits):
                requests[row], positions[row] = request, len(response)
        RECORDER.record(requests, positions, logits)
        return logits
