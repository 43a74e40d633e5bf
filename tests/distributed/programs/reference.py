"""What a model's logits and gradients are, by somebody else's code."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nemotron_nas_reference import Reference


def reference(
    directory: str, tokens: torch.Tensor, dtype: torch.dtype, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [B, S, V], from rank 0, and with `weights` [B, S, V] the gradients of sum(logits * weights).

    Transformers' model, in float64 without its float32 islands; for Nemotron-NAS, which it lacks, our plain one.
    """
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        forward, parameters = _model(directory, dtype)
        with torch.set_grad_enabled(weights is not None):
            logits = forward(tokens)
        gradients = {}
        if weights is not None:
            (logits * weights.to(dtype)).sum().backward()
            gradients = {name: p.grad.clone() for name, p in parameters.items()}
        shared = [(logits.detach(), gradients)]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _model(
    directory: str, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]:
    config = json.loads((Path(directory) / "config.json").read_text())
    if config["architectures"] == ["DeciLMForCausalLM"]:
        ours = Reference(directory, dtype)
        return ours, ours.parameters
    # Seconds to import, on one rank only.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if dtype == torch.float64:
        _without_float32_islands(model)
    return lambda tokens: model.eval()(tokens).logits, dict(model.named_parameters())


def _without_float32_islands(model: Any) -> None:
    """Softmax, RMSNorm and YaRN's attention factor in float64; rotary angles stay float32, as in Megatron."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
        elif type(module).__name__ == "Olmo3RotaryEmbedding":
            module.forward = types.MethodType(_scaled_in_float64(module.forward), module)
    model.set_attn_implementation("sdpa")


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _scaled_in_float64(forward: Any) -> Any:
    def scaled(self: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str) -> Any:
        name = f"{layer_type}_attention_scaling"
        factor = getattr(self, name)
        setattr(self, name, 1.0)
        cos, sin = forward(x, position_ids, layer_type)
        setattr(self, name, factor)
        return cos.double() * factor, sin.double() * factor

    return scaled
