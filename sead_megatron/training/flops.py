"""Model FLOPs of scoring, statistics and update, and what the devices could do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch

from sead_megatron.models.architecture import HFConfig, LayerConfig

# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets; a device that is not listed has no MFU.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def matmul_parameters(config: HFConfig) -> int:
    """Weights that a token is multiplied with: all matrices but the input embedding."""
    return sum(map(_layer_matrices, repeat(config), config.layers)) + config.vocab_size * config.hidden_size


def _layer_matrices(config: HFConfig, layer: LayerConfig) -> int:
    heads = 2 * (config.num_attention_heads + layer.num_key_value_heads) if layer.has_attention else 0
    squares = (layer.attention == "linear") + (layer.mlp == "linear")
    widths = heads * config.head_dim + 3 * layer.ffn_hidden_size + squares * config.hidden_size
    return config.hidden_size * widths


def step_flops(
    student: HFConfig, tokens: int, scored: Iterable[tuple[HFConfig, int]], measured: bool = False
) -> float:
    """FLOPs of updating on `tokens` prompt and response tokens, and of scoring: each teacher and its tokens.

    2 per weight and token forward and 4 backward; attention scores, recomputation and sampling are not counted.
    `measured`: a forward-only pass of the student comes before the update.
    """
    scoring = sum(2.0 * matmul_parameters(teacher) * count for teacher, count in scored)
    return (8.0 if measured else 6.0) * matmul_parameters(student) * tokens + scoring


def device_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)
