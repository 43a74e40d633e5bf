"""Samples and grades the responses to a benchmark's problems, in an evaluation and during training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sead_megatron.data.types import Prompt
from sead_megatron.evaluation.graded import Graded, summary
from sead_megatron.evaluation.grader import Grader
from sead_megatron.evaluation.greedy import pass_flags
from sead_megatron.models.tokenizer import Tokenizer
from sead_megatron.rollout.collect import generate_everywhere, request_seed
from sead_megatron.rollout.engine import Generation, RolloutEngine, Sampling


@dataclass(frozen=True, eq=False)
class Sampler:
    """How responses are made."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    grader: Grader
    samples: int
    sampling: Sampling
    seed: int
    keep_text: bool = False


def respond(sampler: Sampler, benchmark: str, prompts: Sequence[Prompt]) -> list[Graded]:
    """Graded responses to each problem, in order, on every rank (a collective over the world).

    Every prompt has an answer.
    """
    n = sampler.samples
    requests = [prompt for prompt in prompts for _ in range(n)]
    seeds = [
        sample_seed(sampler.seed, benchmark, prompt.id, sample) for prompt in prompts for sample in range(n)
    ]
    ids = [prompt.token_ids for prompt in requests]
    generations = generate_everywhere(sampler.engine, ids, seeds, sampler.sampling)
    flags = pass_flags(requests, [g.token_ids for g in generations], sampler.tokenizer, sampler.grader)
    return [
        _graded(sampler, prompt, generations[i * n : i * n + n], flags[i * n : i * n + n])
        for i, prompt in enumerate(prompts)
    ]


def evaluate_benchmarks(
    sampler: Sampler, benchmarks: Mapping[str, Sequence[Prompt]]
) -> dict[str, dict[str, Any]]:
    """Benchmark -> `graded.summary` of its problems (a collective over the world)."""
    return {name: summary(respond(sampler, name, prompts)) for name, prompts in benchmarks.items()}


def sample_seed(seed: int, benchmark: str, problem: str, sample: int) -> int:
    """The seed of one response: it depends on no other problem, no batch and no rank."""
    digest = hashlib.sha256(f"{benchmark}\0{problem}".encode()).digest()
    return request_seed(seed, int.from_bytes(digest[:8], "big"), sample)


def _graded(
    sampler: Sampler, prompt: Prompt, generations: Sequence[Generation], flags: Sequence[bool | None]
) -> Graded:
    texts = [sampler.tokenizer.decode(generation.token_ids.tolist()) for generation in generations]
    return Graded(
        id=prompt.id,
        answer=prompt.answer or "",
        correct=[bool(flag) for flag in flags],
        lengths=[len(generation.token_ids) for generation in generations],
        finished=[generation.finished for generation in generations],
        empty=[not text.strip() for text in texts],
        responses=texts if sampler.keep_text else None,
    )
