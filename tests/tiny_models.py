"""Tiny random Hugging Face models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random LlamaForCausalLM whose norms are random too: with unit norms a norm test proves nothing."""
    # Seconds to import, for every rank of a program that only wants `fixed_rollout`.
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(options | changes))).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def save_tiny_llama(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes the model as a Hugging Face directory and returns it."""
    tiny_llama(seed, **changes).save_pretrained(directory)
    return directory


def fixed_rollout(prompt: list[int], response: list[int], entropies: list[float] | None = None) -> Any:
    """A rollout that no engine sampled; log probabilities are 0, and so are entropies unless given."""
    from sead_megatron.data.types import Rollout

    zeros = np.zeros(len(response), dtype=np.float32)
    return Rollout(
        prompt_index=0,
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        response_ids=np.asarray(response, dtype=np.int32),
        logprobs=zeros,
        entropies=zeros if entropies is None else np.asarray(entropies, dtype=np.float32),
        finished=True,
        weight_version=0,
    )
