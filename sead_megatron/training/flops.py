"""Model FLOP/s of scoring and update against what the devices could do."""

from __future__ import annotations

import torch

from sead_megatron.models.hf_config import HFConfig

# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets; a device that is not listed has no MFU.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def matmul_parameters(config: HFConfig) -> int:
    """Weights that a token is multiplied with: all matrices but the input embedding."""
    attention = (
        config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    )
    mlp = 3 * config.hidden_size * config.ffn_hidden_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def step_flops(student: HFConfig, teacher: HFConfig, tokens: int) -> float:
    """FLOPs of scoring and updating on `tokens` prompt and response tokens.

    2 per weight and token forward and 4 backward; attention scores, recomputation and sampling are not counted.
    """
    return float(tokens) * (6 * matmul_parameters(student) + 2 * matmul_parameters(teacher))


def device_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)
