"""What the sampler taps record of every sampled token, and the rows of a response taken out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

REQUEST_KEY = "sead_request"
"""A request asks to be tapped with `SamplingParams(extra_args={REQUEST_KEY: i})`."""

NOBODY = -1
"""Stands for the request of a row that is not tapped, and for the position of a row that samples nothing."""

# The columns kept per sampled token.
ENTROPY, LSE, LSE_SCORED, LSE_SAMPLED = range(4)


@dataclass(frozen=True, eq=False)
class TappedRows:
    """Rows of all requests in the order of request and position, at most one of each."""

    requests: np.ndarray
    """int64 [rows]."""
    positions: np.ndarray
    """int64 [rows], in the response: 0 is its first token."""
    values: np.ndarray
    """float32 [rows, 4]."""

    @classmethod
    def of(cls, requests: np.ndarray, positions: np.ndarray, values: np.ndarray) -> TappedRows:
        """Sorts rows in the order they were recorded in; of several for one position the last one counts.

        vLLM samples, and throws away, a token after each chunk of a prompt that it prefills in pieces, and samples a
        preempted request's next token once more.
        """
        order = np.lexsort((np.arange(len(requests)), positions, requests))
        requests, positions = requests[order], positions[order]
        is_last = np.ones(len(order), dtype=bool)
        is_last[:-1] = (requests[1:] != requests[:-1]) | (positions[1:] != positions[:-1])
        return cls(requests[is_last], positions[is_last], values[order[is_last]])

    @classmethod
    def merged(cls, parts: list[TappedRows]) -> TappedRows:
        """The rows of several ranks that each saw some of them."""
        return cls.of(
            np.concatenate([part.requests for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.values for part in parts]),
        )

    def of_response(self, request: int, tokens: int) -> np.ndarray:
        """float32 [tokens, 4]: a request's rows at the positions of its response.

        Rows past the response are left out: with asynchronous scheduling vLLM samples once more before it sees the
        stop token. Raises RuntimeError when a position of the response is missing.
        """
        first, last = np.searchsorted(self.requests, [request, request + 1])
        end = first + np.searchsorted(self.positions[first:last], tokens)
        if not np.array_equal(self.positions[first:end], np.arange(tokens)):
            raise RuntimeError(
                f"the sampler tap saw positions {self.positions[first:last].tolist()[:20]} of response {request}, "
                f"which has {tokens} tokens"
            )
        return self.values[first:end]


class Recorder:
    """Per-token rows of the tapped requests. One engine a process, hence one recorder a process."""

    def __init__(self) -> None:
        self._scored_temperature = 1.0
        self._sampling_temperature = 1.0
        self._chunks: list[tuple[np.ndarray, np.ndarray, Tensor]] = []

    def start(self, scored_temperature: float, sampling_temperature: float) -> None:
        """Forgets earlier rows; sets the temperatures of the loss and of the sampler."""
        self._scored_temperature = scored_temperature
        self._sampling_temperature = sampling_temperature
        self._chunks = []

    def record(self, requests: np.ndarray, positions: np.ndarray, logits: Tensor) -> None:
        """Keeps the statistics of a batch on its device, without synchronising.

        `requests`, `positions`: int64 [rows], `NOBODY` where a row is of no interest. `logits`: [rows, vocabulary],
        before temperature. All rows are measured: choosing some would copy an index to the device in every step.
        """
        if not ((requests != NOBODY) & (positions != NOBODY)).any():
            return
        if logits.dtype != torch.float32:
            raise RuntimeError(f"the sampler tap was given {logits.dtype} logits, must be float32")
        rows = _statistics(logits, self._scored_temperature, self._sampling_temperature)
        self._chunks.append((requests, positions, rows))

    def rows(self) -> TappedRows:
        """Everything since `start` (waits for the device)."""
        if not self._chunks:
            nothing = np.zeros(0, dtype=np.int64)
            return TappedRows(nothing, nothing, np.zeros((0, 4), dtype=np.float32))
        requests = np.concatenate([requests for requests, _, _ in self._chunks])
        positions = np.concatenate([positions for _, positions, _ in self._chunks])
        values = torch.cat([rows for _, _, rows in self._chunks]).cpu().numpy()
        wanted = (requests != NOBODY) & (positions != NOBODY)
        return TappedRows.of(requests[wanted], positions[wanted], values[wanted])


RECORDER = Recorder()


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
