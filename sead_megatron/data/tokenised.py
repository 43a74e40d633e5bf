"""Prompt files -> prompts with token ids. Needs a tokenizer, neither Megatron nor vLLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sead_megatron.config import TrainConfig
from sead_megatron.data.prompts import PromptRecord, check_prompt_lengths, read_prompts
from sead_megatron.data.turns import encode_turns
from sead_megatron.data.types import FixedResponse, Prompt
from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import read_benchmarks
from sead_megatron.models.tokenizer import Tokenizer


def training_prompts(config: TrainConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts to train on, as the teacher reads them too; UserError as in `tokenise`."""
    records = read_prompts(config.data.prompts)
    prompts = tokenise(records, tokenizer, config, config.rollout.max_new_tokens)
    pairs = list(zip(prompts, records, strict=True))
    if config.objective.own_batches < 1:
        prompts = [
            replace(prompt, fixed_response=_fixed(record, config, tokenizer)) for prompt, record in pairs
        ]
        pairs = list(zip(prompts, records, strict=True))
    if config.teacher.context is None:
        return prompts
    return [
        replace(prompt, teacher_token_ids=_teacher_ids(record, config, tokenizer)) for prompt, record in pairs
    ]


def _fixed(record: PromptRecord, config: TrainConfig, tokenizer: Tokenizer) -> FixedResponse:
    """The turns or the solution as a response, cut as a rollout would be."""
    longest = config.rollout.max_new_tokens
    if record.turns is not None:
        where = f"data.prompts: {record.id!r}"
        ids, own = encode_turns(tokenizer, record.messages, record.turns, where)
        return FixedResponse(tuple(ids[:longest]), len(ids) <= longest, tuple(own[:longest]))
    ids = [*tokenizer.encode_text(record.solution or ""), *tokenizer.eos_ids[:1]]
    return FixedResponse(tuple(ids[:longest]), len(ids) <= longest)


def _teacher_ids(record: PromptRecord, config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt with `teacher.context` in place of its last message. UserError when a row cannot hold it."""
    context = config.teacher.context or ""
    *earlier, last = record.messages
    # Not str.format: a problem and its solution are full of braces.
    parts = {"{problem}": last["content"], "{solution}": record.solution or ""}
    content = re.sub(r"\{problem\}|\{solution\}", lambda found: parts[found[0]], context)
    ids = tokenizer.encode_messages([*earlier, {**last, "content": content}])
    room = config.batch.max_tokens_per_microbatch - config.rollout.max_new_tokens
    if len(ids) > room:
        raise UserError(
            "batch.max_tokens_per_microbatch",
            config.batch.max_tokens_per_microbatch,
            f"leaves {room} tokens for what the teacher reads beside a response, and prompt {record.id!r} has "
            f"{len(ids)}",
            f"use at least {len(ids) + config.rollout.max_new_tokens}, or remove long solutions",
        )
    return tuple(ids)


def evaluation_prompts(config: TrainConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The held-out prompts that the configuration names (none when it names no file)."""
    if config.evaluation.prompts is None:
        return []
    records = read_prompts(config.evaluation.prompts, "evaluation.prompts")[: config.evaluation.limit]
    return tokenise(records, tokenizer, config, config.evaluation_max_new_tokens)


def benchmark_prompts(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, list[Prompt]]:
    """Benchmark -> its problems."""
    return {
        benchmark.name: tokenise(
            [
                PromptRecord(problem.id, problem.messages, problem.answer, None)
                for problem in benchmark.problems[: config.evaluation.limit]
            ],
            tokenizer,
            config,
            config.evaluation_max_new_tokens,
        )
        for benchmark in read_benchmarks(config.evaluation.benchmarks, "evaluation.benchmarks")
    }


def tokenise(
    records: Sequence[PromptRecord], tokenizer: Tokenizer, config: TrainConfig, max_new_tokens: int
) -> list[Prompt]:
    """Prompts with their token ids; UserError when one has no token or leaves no room for a response."""
    ids = [tokenizer.encode_messages(record.messages) for record in records]
    lengths = [(record.id, len(tokens)) for record, tokens in zip(records, ids, strict=True)]
    for prompt_id, length in lengths:
        if not length:
            raise UserError(
                f"prompt {prompt_id!r}", None, "has no token once rendered", "give its messages a content"
            )
    check_prompt_lengths(lengths, config.rollout.max_model_len, max_new_tokens)
    return [
        Prompt(record.id, record.messages, record.answer, record.domain, tuple(tokens))
        for record, tokens in zip(records, ids, strict=True)
    ]
