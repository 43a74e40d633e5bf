"""Can this evaluation be done? Found out before anything heavy is imported, or before processes start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sead_megatron.config.checks_layout import check_engine
from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import Benchmark, read_benchmarks
from sead_megatron.evaluation.output import Output, asked_for
from sead_megatron.evaluation.settings import Settings, with_instruction
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.converted import is_distributed
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.tokenizer import Tokenizer
from sead_megatron.models.tokenizer_files import require_tokenizer
from sead_megatron.plan.devices import GIB

if TYPE_CHECKING:
    from sead_megatron.data.types import Prompt


_ITEM_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Evaluation:
    """A checked evaluation."""

    settings: Settings
    companions: Path
    """Where config.json and tokenizer lie."""
    benchmarks: tuple[Benchmark, ...]
    """Cut to `--limit` problems, with the instruction."""

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return self.settings.device

    @property
    def output(self) -> Output:
        """Where results go."""
        return Output(Path(self.settings.output))

    def asked(self) -> dict[str, object]:
        """What evaluation.json will say."""
        return asked_for(self.settings, self.companions, self.benchmarks)


@dataclass(frozen=True)
class Encoded:
    """All prompts with their token ids, and the longest sequence that the engine must hold."""

    prompts: dict[str, list[Prompt]]
    """Benchmark -> its problems."""
    max_model_len: int


def check(settings: Settings, world_size: int) -> Evaluation:
    """Reads config.json and benchmarks; neither torch nor a tokenizer is imported. Raises UserError for the first
    mistake."""
    companions = _companions(settings.model, settings.companions)
    what = "MODEL" if settings.companions is None else "--model"
    model = read_hf_config(companions, what)
    if (reason := FAMILIES[model.architecture].engine_limit(model)) is not None:
        raise UserError(what, str(companions), f"vLLM cannot serve it: {reason}", "use another model")
    require_tokenizer(companions, what)
    check_engine(settings.tensor_parallel, model, world_size, "--tensor-parallel", "the model")
    limit = model.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > limit:
        constraint = f"must be at most the model's max_position_embeddings ({limit})"
        raise UserError("--max-model-len", settings.max_model_len, constraint, "shorten it")
    if settings.max_new_tokens >= limit:
        constraint = f"must be less than the model's max_position_embeddings ({limit})"
        raise UserError("--max-new-tokens", settings.max_new_tokens, constraint, "shorten it")
    benchmarks = tuple(
        replace(
            benchmark,
            problems=tuple(
                replace(problem, messages=with_instruction(problem.messages, settings.instruction))
                for problem in benchmark.problems[: settings.limit]
            ),
        )
        for benchmark in read_benchmarks(list(settings.benchmarks))
    )
    return Evaluation(settings, companions, benchmarks)


def _companions(directory: str, model: str | None) -> Path:
    """Where config.json and tokenizer lie."""
    path = Path(directory)
    if not path.is_dir():
        raise UserError(
            "MODEL", directory, "no such directory", "give the directory of a model or checkpoint"
        )
    has_config = (path / "config.json").is_file()
    if model is not None:
        if has_config or not is_distributed(path):
            constraint = "MODEL is no checkpoint of a run, which alone has no config.json"
            raise UserError("--model", model, constraint, "leave the option out")
        return Path(model)
    if not has_config and is_distributed(path):
        raise UserError(
            "MODEL",
            directory,
            "is a distributed checkpoint without config.json",
            "give --model DIR, the directory of the model that the run trained",
        )
    return path


def preflight(evaluation: Evaluation, local_world_size: int) -> None:
    """Machine, packages, weights, prompts and output directory: what needs torch and a tokenizer, but no process.

    Nothing is written. Raises UserError for the first thing that is wrong.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from sead_megatron.models.tokenizer import load_tokenizer
    from sead_megatron.requirements import VLLM, VLLM_ON_CPU, check_companions, check_installed
    from sead_megatron.rollout.checkpoint_weights import CheckpointWeights

    settings = evaluation.settings
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device", "cuda", "no GPU is visible to torch", "use --device cpu")
        if local_world_size > (gpus := torch.cuda.device_count()):
            constraint = f"must be at most the visible GPUs ({gpus})"
            raise UserError("--nproc-per-node", local_world_size, constraint, f"use {gpus}")
    requirement = VLLM if settings.device == "cuda" else VLLM_ON_CPU
    check_installed(requirement)
    check_companions(requirement)
    CheckpointWeights(settings.model, settings.companions)
    # transformers warns of every text that is longer than the tokenizer's own limit; ours is the one that holds.
    transformers_logging.set_verbosity_error()
    encode(evaluation, load_tokenizer(evaluation.companions))
    evaluation.output.check(evaluation.asked())


def encode(evaluation: Evaluation, tokenizer: Tokenizer) -> Encoded:
    """Renders and tokenises every problem. Raises UserError for one without a token, with one that the model does not
    have, or that leaves no room for a response."""
    from sead_megatron.data.types import Prompt

    settings = evaluation.settings
    model = read_hf_config(evaluation.companions)
    prompts: dict[str, list[Prompt]] = {}
    longest = 0
    for benchmark in evaluation.benchmarks:
        ids = [tokenizer.encode_messages(problem.messages) for problem in benchmark.problems]
        _check_ids(benchmark, ids, model.vocab_size)
        _check_room(benchmark, ids, settings, model.max_position_embeddings)
        longest = max(longest, *map(len, ids))
        prompts[benchmark.name] = [
            Prompt(problem.id, problem.messages, problem.answer, None, tuple(tokens))
            for problem, tokens in zip(benchmark.problems, ids, strict=True)
        ]
    max_model_len = settings.max_model_len or longest + settings.max_new_tokens
    _check_cache(settings, model, max_model_len)
    return Encoded(prompts, max_model_len)


def _check_cache(settings: Settings, model: HFConfig, max_model_len: int) -> None:
    """vLLM does not start when one sequence of `max_model_len` does not fit; sliding layers need less and do not
    count."""
    if settings.kv_cache_gib is None:
        return
    heads = sum(
        max(1, layer.num_key_value_heads // settings.tensor_parallel)
        for layer in model.layers
        if layer.attention == "full"
    )
    needed = 2 * heads * model.head_dim * _ITEM_BYTES[settings.dtype] * max_model_len / GIB
    if needed > settings.kv_cache_gib:
        constraint = (
            f"a sequence of {max_model_len} tokens (prompt and --max-new-tokens) takes {needed:.3g} GiB"
        )
        remedy = f"use at least {_rounded_up(needed)}, better {_rounded_up(needed * settings.max_num_seqs)}"
        raise UserError(
            "--kv-cache-gib", settings.kv_cache_gib, constraint, f"{remedy} for all --max-num-seqs"
        )


def _rounded_up(gib: float) -> str:
    """Up to the next thousandth."""
    return f"{math.ceil(gib * 1000) / 1000:g}"


def _check_ids(benchmark: Benchmark, ids: Sequence[Sequence[int]], vocab_size: int) -> None:
    for problem, tokens in zip(benchmark.problems, ids, strict=True):
        where = f"{benchmark.path}: problem {problem.id}"
        if not tokens:
            raise UserError(where, None, "has no token once rendered", "give its messages a content")
        if max(tokens) >= vocab_size:
            constraint = f"has the token id {max(tokens)}, but the model's vocab_size is {vocab_size}"
            raise UserError(where, None, constraint, "use the tokenizer that belongs to the model")


def _check_room(
    benchmark: Benchmark, ids: Sequence[Sequence[int]], settings: Settings, model_limit: int
) -> None:
    """Prompt and response must fit in `--max-model-len`, or in the model's longest sequence where that is not given."""
    bound = settings.max_model_len or model_limit
    room = bound - settings.max_new_tokens
    too_long = [i for i, tokens in enumerate(ids) if len(tokens) > room]
    if too_long:
        worst = max(too_long, key=lambda i: len(ids[i]))
        name = "--max-model-len" if settings.max_model_len else "the model's max_position_embeddings"
        raise UserError(
            "--max-new-tokens",
            settings.max_new_tokens,
            f"leaves {room} tokens of {name} ({bound}) for a prompt, but {len(too_long)} of {len(ids)} in "
            f"{benchmark.name} are longer, the longest {benchmark.problems[worst].id!r} with {len(ids[worst])}",
            f"use at most {bound - len(ids[worst])}" if bound > len(ids[worst]) else "use another model",
        )
