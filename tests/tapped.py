"""Hand-made logits for the sampler taps, and what the recorder made of them."""

from __future__ import annotations

import torch

from sead_megatron.rollout.tap_recorder import ENTROPY, RECORDER

VOCABULARY = 32


def logits(*values: float) -> torch.Tensor:
    """One row for each value: that logit for token 0, zeros elsewhere, so the entropy tells the row."""
    rows = torch.zeros(len(values), VOCABULARY)
    rows[:, 0] = torch.tensor(values)
    return rows


def entropy(value: float) -> float:
    """Of the distribution that `logits(value)` stands for, in nats, by float64."""
    logprobs = logits(value).double()[0].log_softmax(-1)
    return float(-(logprobs.exp() * logprobs).sum())


def recorded() -> dict[int, list[float]]:
    """Request -> entropies of its recorded positions, which must be those from 0 on."""
    rows = RECORDER.rows()
    counts = {int(request): int((rows.requests == request).sum()) for request in set(rows.requests)}
    return {
        request: rows.of_response(request, tokens)[:, ENTROPY].tolist() for request, tokens in counts.items()
    }
