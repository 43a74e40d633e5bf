"""Batches of fixed responses between those of the student's own rollouts (GKD, arXiv 2306.13649, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sead_megatron.data.types import FIXED_RESPONSE, Prompt, Rollout

# Keeps this generator apart from those of the curriculum, whose keys are (seed, step).
_STREAM = 0x6D1


def is_own_batch(seed: int, step: int, student_share: float) -> bool:
    """The coin of zero-based ``step``: whether its batch is sampled from the student. Equal on every rank."""
    return bool(np.random.default_rng([seed, _STREAM, step]).random() < student_share)


def fixed_rollouts(batch: Sequence[int], prompts: Sequence[Prompt], samples: int) -> list[Rollout]:
    """The fixed responses to some prompts, each `samples` times, as if they had been sampled."""
    return [_fixed(index, prompts[index]) for index in batch for _ in range(samples)]


def _fixed(index: int, prompt: Prompt) -> Rollout:
    if prompt.fixed_response is None:
        raise ValueError(f"prompt {prompt.id!r} has no fixed response")
    response = prompt.fixed_response
    teacher_ids = prompt.teacher_token_ids
    return Rollout(
        prompt_index=index,
        prompt_ids=np.asarray(prompt.token_ids, dtype=np.int32),
        response_ids=np.asarray(response.ids, dtype=np.int32),
        logprobs=None,
        entropies=None,
        finished=response.finished,
        weight_version=FIXED_RESPONSE,
        teacher_prompt_ids=None if teacher_ids is None else np.asarray(teacher_ids, dtype=np.int32),
        trained=None if response.trained is None else np.asarray(response.trained, dtype=np.bool_),
    )
