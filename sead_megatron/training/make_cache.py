"""`python -m sead_megatron cache CONFIG`: responses of the initial student, scored once by the teacher.

Engine, teacher and layouts are those of an online run of sampled OPD, so what fits such a run fits this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sead_megatron.config import TrainConfig
from sead_megatron.data.response_cache import cache_writer
from sead_megatron.data.types import Rollout, TokenTable
from sead_megatron.rollout.collect import as_rollout, generate_everywhere, request_seed
from sead_megatron.training.job import Job, build_job, init_world
from sead_megatron.training.scoring import with_teacher_columns
from sead_megatron.training.step_plan import plan_step

# Keeps these seeds apart from those of training, whose keys are (seed, step, index).
_SEED_STREAM = 0xCAC4E


def main(config: TrainConfig) -> None:
    """Runs this rank; `config` is a `scoring_config`."""
    writer = cache_writer(config)
    head = int(os.environ["RANK"]) == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not head) as progress:
        job = build_job(
            config, init_world(config.device), lambda text: progress.print(text) if head else None
        )
        # The first rank decides: another may not see a new file yet.
        agreed: list[Any] = [writer.missing_parts()]
        dist.broadcast_object_list(agreed)
        if head:
            writer.start()
        task = progress.add_task("prompts", total=len(job.prompts))
        progress.advance(task, len(job.prompts) - sum(len(writer.prompts_of(part)) for part in agreed[0]))
        for part in agreed[0]:
            prompts = writer.prompts_of(part)
            rollouts, table = _sample_and_score(job, prompts)
            if head:
                writer.write(part, list(_rows(job, rollouts, table)))
            progress.advance(task, len(prompts))
    job.engine.close()
    dist.barrier()
    dist.destroy_process_group()
    if head:
        print(f"{config.run_dir}: {len(job.prompts)} prompts", file=sys.stderr)


def _sample_and_score(job: Job, prompts: Sequence[int]) -> tuple[list[Rollout], TokenTable]:
    """A part's responses, and their table with the teacher's logprobs (a collective over the world)."""
    samples = job.config.rollout.samples_per_prompt
    keys = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    asked = [job.prompts[prompt] for prompt, _ in keys]
    seeds = [request_seed(job.config.seed, _SEED_STREAM, *key) for key in keys]
    ids = [prompt.token_ids for prompt in asked]
    # As in a training step: the engine's memory is the teacher's while that scores.
    job.sync_weights(0)
    generations = generate_everywhere(job.engine, ids, seeds, job.sampling(None))
    job.engine.sleep()
    rollouts = [
        as_rollout(index, prompt.token_ids, generation, 0, prompt.teacher_token_ids)
        for (index, _), prompt, generation in zip(keys, asked, generations, strict=True)
    ]
    models = job.models
    plan = plan_step(rollouts, models.student.model.groups.layout, [0] * len(rollouts))
    table = TokenTable.from_rollouts(rollouts, job.device)
    return rollouts, with_teacher_columns(models, job.objective, plan, models.teachers.score(plan), table)


def _rows(job: Job, rollouts: Sequence[Rollout], table: TokenTable) -> Iterator[dict[str, Any]]:
    samples = job.config.rollout.samples_per_prompt
    scored = table.require("teacher_logprob").cpu().numpy()
    for i, rollout in enumerate(rollouts):
        yield {
            "id": job.prompts[rollout.prompt_index].id,
            "sample": i % samples,
            "prompt_ids": rollout.prompt_ids,
            "response_ids": rollout.response_ids,
            "finished": rollout.finished,
            "logprobs": rollout.logprobs,
            "entropies": rollout.entropies,
            "sampling_logprobs": rollout.sampling_logprobs,
            "teacher_logprobs": scored[table.rollout_slice(i)],
        }
