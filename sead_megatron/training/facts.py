"""What an objective may know of whole rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sead_megatron.data.types import Prompt, Rollout, RolloutFacts


def rollout_facts(
    rollouts: Sequence[Rollout],
    passed: Sequence[bool | None],
    prompts: Sequence[Prompt],
    difficulties: Sequence[float] | None,
    *,
    samples_per_prompt: int,
    longest: int,
) -> RolloutFacts:
    """Facts of the global batch, whose rollouts of one prompt follow each other.

    Args:
        passed: whether each rollout has the right final answer, None without a gold answer.
        prompts, difficulties: of the whole prompt set, by `Rollout.prompt_index`.
    """
    rewards = [math.nan if flag is None else float(flag) for flag in passed]
    own = None if difficulties is None else [difficulties[rollout.prompt_index] for rollout in rollouts]
    return RolloutFacts(
        group=torch.arange(len(rollouts)) // samples_per_prompt,
        reward=torch.tensor(rewards, dtype=torch.float32),
        finished=torch.tensor([rollout.finished for rollout in rollouts], dtype=torch.bool),
        longest=longest,
        difficulty=None if own is None else torch.tensor(own, dtype=torch.float32),
        domains=tuple(prompts[rollout.prompt_index].domain for rollout in rollouts),
    )
