"""Reads full-vocabulary statistics out of vLLM's sampler, so that a step needs no second student forward.

Rollouts are sampled with the very weights that are about to be updated. A logits processor sees the float32
logits of every sampled position before temperature, hence the exact entropy of the student at every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

REQUEST_KEY = "sead_request"

# The columns kept per sampled token.
ENTROPY, LSE, LSE_SCORED, LSE_SAMPLED = range(4)


class _Recorder:
    """Per-token rows of the tapped requests. One engine a process, hence one recorder a process."""

    def __init__(self) -> None:
        self.scored_temperature = 1.0
        self.sampling_temperature = 1.0
        self._chunks: list[tuple[list[tuple[int, int]], Tensor]] = []

    def start(self, scored_temperature: float, sampling_temperature: float) -> None:
        """Forgets earlier rows; sets the temperatures of the loss and of the sampler."""
        self.scored_temperature = scored_temperature
        self.sampling_temperature = sampling_temperature
        self._chunks = []

    def record(self, positions: list[tuple[int, int]], rows: Tensor) -> None:
        """Keeps rows [len(positions), 4] of (request, response position) on their device, without synchronising."""
        self._chunks.append((positions, rows))

    def rows_by_request(self) -> dict[int, np.ndarray]:
        """Request id -> float32 [tokens, 4] in sampling order.

        vLLM also samples, and throws away, a token after each chunk of a prompt that it prefills in pieces: of
        several rows for one position the last is the one that counts.
        """
        if not self._chunks:
            return {}
        rows = torch.cat([rows for _, rows in self._chunks]).cpu().numpy()
        last = {
            position: i for i, position in enumerate(p for positions, _ in self._chunks for p in positions)
        }
        by_request: dict[int, list[int]] = {}
        for (request, _), i in sorted(last.items()):
            by_request.setdefault(request, []).append(i)
        return {request: rows[indices] for request, indices in by_request.items()}


RECORDER = _Recorder()


class SamplerTap(LogitsProcessor):
    """Records entropy and log-sum-exps of each sampled position of the requests that ask for it.

    A request asks with `SamplingParams(extra_args={REQUEST_KEY: i})`. The logits pass unchanged.
    """

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
            request = (params.extra_args or {}).get(REQUEST_KEY)
            if request is not None:
                rows[row] = (request, response)
        for source, target, direction in batch_update.moved:
            moved, displaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = displaced

    def apply(self, logits: Tensor) -> Tensor:
        """`logits`: float32 [batch rows, vocabulary], before temperature."""
        tapped = sorted(row for row in self._request_of_row if row < logits.shape[0])
        if tapped:
            rows = _statistics(logits[tapped], RECORDER.scored_temperature, RECORDER.sampling_temperature)
            requests = (self._request_of_row[row] for row in tapped)
            RECORDER.record([(request, len(response)) for request, response in requests], rows)
        return logits


def _statistics(logits: Tensor, scored_temperature: float, sampling_temperature: float) -> Tensor:
    """[rows, vocabulary] to [rows, 4]: entropy (nats) and lse at the loss' temperature, lse at 1 and at sampling."""
    lse = logits.logsumexp(-1)
    if scored_temperature == 1.0:
        scaled, lse_scored = logits, lse
    else:
        scaled = logits / scored_temperature
        lse_scored = scaled.logsumexp(-1)
    logprobs = scaled - lse_scored[:, None]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    lse_sampled = (logits / sampling_temperature).logsumexp(-1) if sampling_temperature > 0 else lse
    return torch.stack([entropy, lse, lse_scored, lse_sampled], dim=-1)
