"""A random student and teacher as Hugging Face directories, fixed responses, and the run's configuration.

Written by hand: neither transformers nor a download is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sead_megatron.config import TrainConfig
from sead_megatron.config.schema import PrecisionConfig
from sead_megatron.data.types import Coefficients, Rollout


@dataclass(frozen=True)
class Shape:
    """Llama shapes: both models have them, but for the teacher's `teacher_width`."""

    width: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    teacher_width: int
    tied: bool = False
    spread: float = 0.1
    """Standard deviation of the weights."""


TINY = Shape(64, 2, 8, 4, 16, 160, 250, 96)
SMALL = Shape(256, 4, 8, 4, 32, 512, 1000, 320)
# Llama-3.2-1B, 1.24e9 parameters.
BILLION = Shape(2048, 16, 32, 8, 64, 8192, 128256, 2048, tied=True, spread=0.02)


@dataclass(frozen=True)
class Load:
    """Fixed responses of a step: `count` of up to `prompt` and `response` tokens, ragged unless `full`."""

    count: int
    prompt: int
    response: int
    row: int
    """`batch.max_tokens_per_microbatch`."""
    full: bool = False


def write_pair(directory: Path, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Path, Path]:
    """(student, teacher) directories; random values are drawn on `device`."""
    student = _write_model(directory / "student", shape, shape.width, dtype, device, seed=1)
    return student, _write_model(directory / "teacher", shape, shape.teacher_width, dtype, device, seed=2)


def _write_model(
    directory: Path, shape: Shape, width: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Path:
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in _tensor_shapes(shape, width).items():
        values = torch.empty(size, dtype=torch.float32, device=device).normal_(generator=generator)
        # Unit norms would prove nothing of a norm.
        values = 1 + 0.3 * values if "norm" in name else shape.spread * values
        tensors[name] = values.to(dtype).cpu()
    save_file(tensors, directory / "model.safetensors")
    return directory


def _tensor_shapes(shape: Shape, width: int) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (shape.ffn, width),
        "mlp.up_proj": (shape.ffn, width),
        "mlp.down_proj": (width, shape.ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.norm.weight": (width,),
        "model.embed_tokens.weight": (shape.vocabulary, width),
    }
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocabulary, width)
    for number in range(shape.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return shapes


def config_of(
    student: Path, teacher: Path, load: Load, device: torch.device, dtype: torch.dtype
) -> TrainConfig:
    """One rank, no engine, the distributed optimizer; local layers where they have to be asked for."""
    precision: dict[str, object] = dict.fromkeys(("student", "teacher"), str(dtype).removeprefix("torch."))
    if "allow_local_layers" in PrecisionConfig.model_fields:
        precision["allow_local_layers"] = True
    return TrainConfig.model_validate(
        {
            "device": device.type,
            "run_dir": "unused",
            "steps": 10,
            "student": {"path": str(student)},
            "teacher": {"path": str(teacher)},
            "precision": precision,
            "data": {"prompts": "unused", "prompts_per_step": load.count},
            "rollout": {
                "max_new_tokens": load.response,
                "max_model_len": load.prompt + load.response,
                "kv_cache_gib": 0.1,
            },
            "objective": {"name": "opd"},
            "batch": {"max_tokens_per_microbatch": load.row},
            # Adam divides by sqrt(v): with a tiny epsilon a gradient of rounding noise moves a weight by lr.
            "optimizer": {"lr": 1e-2, "decay": "constant", "eps": 1e-3},
        }
    )


def fixed_rollouts(load: Load, vocabulary: int, seed: int = 0) -> list[Rollout]:
    """Random tokens, the same everywhere."""
    generator = np.random.default_rng(seed)
    rollouts = []
    for index in range(load.count):
        lengths = (load.prompt, load.response)
        if not load.full:
            lengths = (
                int(generator.integers(2, load.prompt + 1)),
                int(generator.integers(1, load.response + 1)),
            )
        prompt, response = (generator.integers(3, vocabulary, n).astype(np.int32) for n in lengths)
        zeros = np.zeros(len(response), dtype=np.float32)
        rollouts.append(
            Rollout(
                prompt_index=index,
                prompt_ids=prompt,
                response_ids=response,
                logprobs=zeros,
                entropies=zeros,
                finished=True,
                weight_version=0,
            )
        )
    return rollouts


def fixed_coefficients(tokens: int, device: torch.device) -> Coefficients:
    """All four terms, a third of the tokens without any; drawn on the CPU, so the same on every device."""
    weights = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(3))
    weights[:, 2:] *= 0.1
    weights[::3] = 0
    return Coefficients(weights.to(device), float(tokens))
