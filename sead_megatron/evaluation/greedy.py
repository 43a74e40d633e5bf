"""Held-out accuracy of the current student by greedy decoding on the rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from sead_megatron.data.types import Prompt
from sead_megatron.evaluation.grader import Grader
from sead_megatron.models.tokenizer import Tokenizer
from sead_megatron.rollout.collect import generate_everywhere
from sead_megatron.rollout.engine import RolloutEngine, Sampling


def pass_flags(
    prompts: Sequence[Prompt],
    responses: Sequence[npt.NDArray[np.int32]],
    tokenizer: Tokenizer,
    grader: Grader,
) -> list[bool | None]:
    """Whether each response, its tokens, has the right final answer (None without a gold answer), on every rank.

    A collective over the world: grading is dealt out over the ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine: dict[int, bool | None] = dict.fromkeys(range(rank, len(prompts), world))
    pairs = {
        i: (tokenizer.decode(responses[i].tolist()), answer)
        for i in mine
        if (answer := prompts[i].answer) is not None
    }
    mine.update(zip(pairs, grader.grade_many(list(pairs.values())), strict=True))
    gathered: list[dict[int, bool | None]] = [{} for _ in range(world)]
    dist.all_gather_object(gathered, mine)
    flags = {i: flag for part in gathered for i, flag in part.items()}
    return [flags[i] for i in range(len(prompts))]


def evaluate_greedy(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    grader: Grader,
    max_new_tokens: int,
    step: int,
) -> dict[str, Any]:
    """One record of `evaluations.jsonl` (a collective over the world; needs at least one prompt)."""
    sampling = Sampling(0.0, max_new_tokens, tuple(tokenizer.eos_ids))
    generations = generate_everywhere(
        engine, [prompt.token_ids for prompt in prompts], [0] * len(prompts), sampling
    )
    flags = pass_flags(prompts, [g.token_ids for g in generations], tokenizer, grader)
    correct = sum(bool(flag) for flag in flags)
    return {
        "step": step,
        "accuracy": correct / len(prompts),
        "correct": correct,
        "total": len(prompts),
        "truncated": sum(not g.finished for g in generations) / len(prompts),
        "length_mean": sum(len(g.token_ids) for g in generations) / len(prompts),
    }
