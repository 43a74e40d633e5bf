"""Rollouts of a set of prompts, spread over the engines of the world and gathered on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from sead_megatron.data.types import Rollout
from sead_megatron.rollout.engine import Generation, RolloutEngine, Sampling


def request_seed(*key: int) -> int:
    """A 31-bit seed from integers such as (run seed, step, index): the same on every machine and layout."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] & 0x7FFFFFFF)


def as_rollout(
    prompt_index: int,
    prompt_ids: Sequence[int],
    generation: Generation,
    weight_version: int,
    teacher_prompt_ids: Sequence[int] | None = None,
) -> Rollout:
    """What the trainer keeps of a generation; `teacher_prompt_ids` where the teacher reads another prompt."""
    return Rollout(
        prompt_index=prompt_index,
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        response_ids=generation.token_ids,
        logprobs=generation.logprobs,
        entropies=generation.entropies,
        finished=generation.finished,
        weight_version=weight_version,
        sampling_logprobs=generation.sampling_logprobs,
        teacher_prompt_ids=None
        if teacher_prompt_ids is None
        else np.asarray(teacher_prompt_ids, dtype=np.int32),
    )


def generate_everywhere(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
) -> list[Generation]:
    """One response for each prompt, in order, on every rank of the world (a collective over it).

    Prompts are dealt to the engines in turn, so that an easy-to-hard batch is spread evenly.
    """
    mine = range(engine.replica, len(prompts), engine.num_replicas)
    generated = engine.generate([prompts[i] for i in mine], [seeds[i] for i in mine], sampling)
    contribution = list(zip(mine, generated, strict=True)) if engine.is_replica_head else []
    gathered: list[list[tuple[int, Generation]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, contribution)
    by_index = {i: generation for part in gathered for i, generation in part}
    return [by_index[i] for i in range(len(prompts))]
