"""What an evaluation is asked to do, from its command line. Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sead_megatron.config.schema import DType, RolloutConfig
from sead_megatron.errors import UserError

_DEFAULT_DTYPE: dict[str, DType] = {"cuda": "bfloat16", "cpu": "float32"}
_DEFAULT_CPU_CACHE_GIB = 1.0


@dataclass(frozen=True)
class Settings:
    """A checked command line; each field is the option of its name."""

    model: str
    companions: str | None
    """`--model`: where config.json and tokenizer of a run's checkpoint lie."""
    benchmarks: tuple[str, ...]
    output: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    max_model_len: int | None
    """None: what the longest prompt and `max_new_tokens` need."""
    limit: int | None
    instruction: str | None
    save_text: bool
    device: Literal["cuda", "cpu"]
    dtype: DType
    seed: int
    tensor_parallel: int
    max_num_seqs: int
    kv_cache_gib: float | None
    gpu_memory_utilization: float
    batch: int | None

    def shared(self) -> dict[str, Any]:
        """What all benchmarks of an output directory have in common, without the model."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "instruction": self.instruction,
        }

    def of_benchmark(self) -> dict[str, Any]:
        """What may differ between benchmarks of an output directory: the paper decodes three of its six greedily."""
        return {
            "samples": self.samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "save_text": self.save_text,
        }

    def rollout(self, max_model_len: int) -> RolloutConfig:
        """The engine's settings."""
        return RolloutConfig(
            tensor_parallel=self.tensor_parallel,
            max_new_tokens=self.max_new_tokens,
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_gib=self.kv_cache_gib,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`. None stands for what was not given: `--compare` takes none of most."""
    add = parser.add_argument
    add(
        "model", nargs="?", metavar="MODEL", help="Hugging Face or converted directory, or a run's checkpoint"
    )
    add("--benchmarks", nargs="+", metavar="FILE", help="JSONL or parquet (docs/evaluation.md)")
    add("--output", metavar="DIR", help="where results go; the same command continues there")
    add("--compare", nargs="+", metavar="DIR", help="put output directories side by side; evaluates nothing")
    add("--model", dest="companions", metavar="DIR", help="config.json and tokenizer of a run's checkpoint")
    add("--samples", type=int, default=1, metavar="N", help="responses of each problem (default 1)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default 1: off)")
    add("--max-new-tokens", type=int, default=1024, metavar="M", help="longest response (default 1024)")
    add("--max-model-len", type=int, metavar="L", help="prompt and response; default: what the prompts need")
    add("--limit", type=int, metavar="K", help="only the first K problems of each benchmark")
    add("--instruction", metavar="TEXT", help="added to the last message of every problem")
    add("--save-text", action="store_true", help="keep the responses' text")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default cuda")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on cuda, float32 on the CPU")
    add("--seed", type=int, default=1234, metavar="S", help="of the sampling (default 1234)")
    add("--tensor-parallel", type=int, default=1, metavar="TP", help="ranks of one engine (default 1)")
    add("--max-num-seqs", type=int, default=64, metavar="N", help="sequences an engine decodes at once (64)")
    add("--kv-cache-gib", type=float, metavar="GIB", help="of an engine rank; default on the CPU: 1")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of an engine (default 0.9)",
    )
    add("--batch", type=int, metavar="B", help="problems between two writes; default: two waves of sequences")


def is_comparison(options: argparse.Namespace) -> bool:
    """Whether `--compare` was given. Raises UserError when an evaluation was asked for as well."""
    if options.compare is None:
        return False
    if options.model is not None or options.benchmarks is not None:
        raise _command_line("--compare takes output directories and no MODEL or --benchmarks")
    return True


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of a parsed command line. Raises UserError for the first that cannot be."""
    missing = [
        name
        for name, value in (
            ("MODEL", options.model),
            ("--benchmarks", options.benchmarks),
            ("--output", options.output),
        )
        if value is None
    ]
    if missing:
        raise _command_line(f"the following arguments are required: {', '.join(missing)}")
    for name in ("samples", "max_new_tokens", "tensor_parallel", "max_num_seqs"):
        _check_at_least(name, getattr(options, name), 1)
    for name in ("max_model_len", "limit", "batch"):
        if getattr(options, name) is not None:
            _check_at_least(name, getattr(options, name), 1)
    _check_at_least("seed", options.seed, 0)
    _check_sampling(options.samples, options.temperature, options.top_p)
    _check_memory(options)
    if options.max_model_len is not None and options.max_new_tokens >= options.max_model_len:
        raise UserError(
            "--max-new-tokens",
            options.max_new_tokens,
            f"must be less than --max-model-len ({options.max_model_len}): it holds the prompt too",
            "shorten it, or leave --max-model-len out",
        )
    if options.instruction is not None and not options.instruction.strip():
        raise UserError("--instruction", options.instruction, "must not be blank", "leave it out")
    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    given["benchmarks"] = tuple(options.benchmarks)
    given["dtype"] = options.dtype or _DEFAULT_DTYPE[options.device]
    if options.device == "cpu" and options.kv_cache_gib is None:
        given["kv_cache_gib"] = _DEFAULT_CPU_CACHE_GIB
    return Settings(**given)


def _command_line(message: str) -> UserError:
    return UserError("command line", None, message, "run `python -m sead_megatron evaluate --help`")


def _check_at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise UserError(
            f"--{name.replace('_', '-')}", value, f"must be at least {bound}", f"use {bound} or more"
        )


def _check_sampling(samples: int, temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError("--temperature", temperature, "must be 0 (greedy) or positive", "use for example 0.6")
    if not 0 < top_p <= 1:
        raise UserError("--top-p", top_p, "must be above 0 and at most 1", "use for example 0.95")
    if temperature == 0 and samples > 1:
        raise UserError(
            "--samples",
            samples,
            "needs --temperature above 0: greedy responses to a problem are all the same",
            "add for example --temperature 0.6, or leave --samples out",
        )
    if temperature == 0 and top_p < 1:
        raise UserError(
            "--top-p", top_p, "changes nothing at temperature 0", "leave it out, or give --temperature"
        )


def _check_memory(options: argparse.Namespace) -> None:
    if options.kv_cache_gib is not None and not 0 < options.kv_cache_gib < float("inf"):
        raise UserError("--kv-cache-gib", options.kv_cache_gib, "must be positive", "use for example 1")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise UserError(
            "--gpu-memory-utilization",
            options.gpu_memory_utilization,
            "must be above 0 and at most 1",
            "use for example 0.9",
        )


def with_instruction(messages: Sequence[dict[str, str]], instruction: str | None) -> list[dict[str, str]]:
    """The messages with `instruction` as a paragraph of its own at the end of the last one."""
    if instruction is None:
        return list(messages)
    last = messages[-1]
    return [*messages[:-1], last | {"content": f"{last['content']}\n\n{instruction}"}]
