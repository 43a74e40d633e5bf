"""Tiny random Hugging Face directories of every model family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import nemotron_nas_reference
from tests.tiny_models import LLAMA3_ROPE, save_tiny_llama

_SHAPE: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
}


def save_tiny_qwen3(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Qwen3, untied unless `changes` say otherwise."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = _SHAPE | {
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return _save(Qwen3ForCausalLM, Qwen3Config, options, directory, seed, changes)


def save_tiny_olmo3(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """OLMo-3 with a window of 7 tokens in three of four layers and YaRN on the fourth."""
    from transformers import Olmo3Config, Olmo3ForCausalLM

    options = _SHAPE | {
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "sliding_window": 7,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "full_attention": YARN,
        },
    }
    return _save(Olmo3ForCausalLM, Olmo3Config, options, directory, seed, changes)


def _save(
    model_class: type, config_class: type, options: dict[str, Any], directory: Path, seed: int, changes: Any
) -> Path:
    torch.manual_seed(seed)
    given = {"initializer_range": 0.2, "tie_word_embeddings": False} | options | changes
    model = model_class(config_class(**given)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # with unit norms a norm test proves nothing
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def attention_block(group: int | None = 2, *, no_op: bool = False, linear: bool = False) -> dict[str, Any]:
    """`attention` of a Nemotron-NAS block, with the keys of the published checkpoints."""
    return {
        "n_heads_in_group": None if no_op or linear else group,
        "no_op": no_op,
        "num_sink_tokens": None,
        "replace_with_linear": linear,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def ffn_block(multiplier: float | None, *, no_op: bool = False, linear: bool = False) -> dict[str, Any]:
    """`ffn` of a Nemotron-NAS block."""
    return {
        "ffn_mult": None if no_op or linear else multiplier,
        "no_op": no_op,
        "replace_with_linear": linear,
        "sparsify": None,
    }


# KV heads 4 and 2, FFN widths 256, 512 and 768, everything that can be missing or replaced.
BLOCKS = [
    {"attention": attention_block(2), "ffn": ffn_block(2.625)},
    {"attention": attention_block(no_op=True), "ffn": ffn_block(12.5)},
    {"attention": attention_block(linear=True), "ffn": ffn_block(1.0)},
    {"attention": attention_block(4), "ffn": ffn_block(None, linear=True)},
    {"attention": attention_block(2), "ffn": ffn_block(None, no_op=True)},
    {"attention": attention_block(no_op=True), "ffn": ffn_block(16.0)},
]
# What vLLM serves: published checkpoints replace nothing by a matrix.
SERVED_BLOCKS = [BLOCKS[0], BLOCKS[1], BLOCKS[4], BLOCKS[5], {**BLOCKS[0], "attention": attention_block(4)}]


def save_tiny_nemotron_nas(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Nemotron-NAS with `BLOCKS`."""
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    config = _SHAPE | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "block_configs": BLOCKS,
        "head_dim": 8,
        "hidden_act": "silu",
        "intermediate_size": None,
        "num_key_value_heads": None,
        "rope_scaling": rope,
        "rope_theta": LLAMA3_ROPE["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    config |= {key: value for key, value in changes.items() if key != "initializer_range"}
    config["num_hidden_layers"] = len(config["block_configs"])
    scale = changes.get("initializer_range", 0.2)
    return nemotron_nas_reference.write_random(directory, config, seed, scale)


def save_tiny_llama3(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Llama with llama3 rope scaling, as Nemotron Nano 8B has it."""
    options = {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 32768}
    return save_tiny_llama(directory, seed, **(options | changes))


SAVE_TINY: dict[str, Callable[..., Path]] = {
    "llama": save_tiny_llama3,
    "nemotron_nas": save_tiny_nemotron_nas,
    "olmo3": save_tiny_olmo3,
    "qwen3": save_tiny_qwen3,
}
