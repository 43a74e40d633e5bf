"""What vLLM is told, and what it makes of it: options, model runner, scheduling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import EngineArgs, __version__, envs
from vllm.usage.usage_lib import UsageContext

from sead_megatron.config import RolloutConfig
from sead_megatron.errors import UserError
from sead_megatron.rollout.sampler_tap import SamplerTapV1, SamplerTapV2

GIB = 1 << 30
_CPU_BATCHED_TOKENS = 4096


@dataclass(frozen=True)
class EngineSetup:
    """How vLLM will run with a set of options."""

    tap: type[SamplerTapV1] | type[SamplerTapV2]
    """The sampler tap of the model runner that vLLM chooses."""
    deals_rows: bool
    """Whether each tensor-parallel rank samples, and taps, some of the rows only (batch-sharded sampling)."""
    description: str
    """Version, model runner and scheduling in a line, with the reason of the choice."""


def engine_options(
    config: RolloutConfig, model_directory: str | Path, *, dtype: str, on_cpu: bool, seed: int
) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`, but for the sampler tap."""
    options: dict[str, Any] = {
        "model": str(model_directory),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": config.tensor_parallel,
        "dtype": dtype,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "seed": seed,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
    }
    if config.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    if on_cpu:
        # A prompt prefilled in pieces rewinds its request's generator, which CPU generators cannot (vllm 0.32.0:
        # "CPU Generator does not use offset").
        return options | {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, _CPU_BATCHED_TOKENS),
        }
    return options | {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": True,
        # vLLM's plain name "fp8" means the same for weights in high precision, and is deprecated (0.32).
        "quantization": None if config.quantization == "none" else "fp8_per_tensor",
        "async_scheduling": config.async_scheduling,
    }


def inspect_setup(options: Mapping[str, Any]) -> EngineSetup:
    """Asks vLLM what it will do with these options; takes some 50 ms and builds nothing.

    Raises UserError for what the sampler tap cannot follow.
    """
    vllm = EngineArgs(**options).create_engine_config(UsageContext.LLM_CLASS)
    if vllm.speculative_config is not None:
        raise UserError(
            "vLLM",
            f"speculative decoding ({vllm.speculative_config.method})",
            "must be off: statistics of tokens are taken where each is sampled",
            "remove what turns it on",
        )
    is_v2 = bool(vllm.use_v2_model_runner)
    scheduling = "asynchronous" if vllm.scheduler_config.async_scheduling else "synchronous"
    sharded = bool(vllm.parallel_config.enable_batch_sharded_sampling)
    parts = [
        f"vLLM {__version__}",
        f"model runner {'V2' if is_v2 else 'V1'} ({_reason(vllm, is_v2)})",
        f"{scheduling} scheduling",
    ]
    if sharded:
        parts.append("batch-sharded sampling")
    return EngineSetup(SamplerTapV2 if is_v2 else SamplerTapV1, sharded, ", ".join(parts))


def _reason(vllm: Any, is_v2: bool) -> str:
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return f"VLLM_USE_V2_MODEL_RUNNER={int(envs.VLLM_USE_V2_MODEL_RUNNER)}"
    if is_v2:
        return "vLLM's choice"
    unsupported = vllm._get_v2_model_runner_unsupported_features()
    return f"V2 does not support {', '.join(unsupported)}" if unsupported else "V2 needs Triton"
