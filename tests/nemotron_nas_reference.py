"""Nemotron-NAS in plain torch, from config.json and safetensors: what our conversion is compared with.

The published modelling code is not part of any installed package. This one shares nothing with the product: block
arithmetic, attention, rotary embedding and RMSNorm are written out; vLLM's implementation is a second witness.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_random(directory: Path, config: dict[str, Any], seed: int, scale: float) -> Path:
    """A Hugging Face directory with random weights; norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if "norm" in name else scale * noise
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def ffn_width(block: dict[str, Any], hidden: int) -> int:
    """2/3 of ffn_mult times H, up to the next multiple of 256."""
    width = int(2 * block["ffn_mult"] * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads, width = config["num_attention_heads"], config["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i, block in enumerate(config["block_configs"]):
        layer, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            found[f"{layer}.input_layernorm.weight"] = (hidden,)
            if attention["replace_with_linear"]:
                found[f"{layer}.self_attn.linear_attn.weight"] = (hidden, hidden)
            else:
                keys = heads // attention["n_heads_in_group"] * width
                rows = {"q": heads * width, "k": keys, "v": keys}
                found |= {f"{layer}.self_attn.{x}_proj.weight": (n, hidden) for x, n in rows.items()}
                found[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * width)
        if not ffn["no_op"]:
            found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            if ffn["replace_with_linear"]:
                found[f"{layer}.mlp.linear_mlp.weight"] = (hidden, hidden)
            else:
                inner = ffn_width(ffn, hidden)
                found |= {f"{layer}.mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
                found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return found


class Reference:
    """Logits of a directory; `parameters` are leaves that gradients can be taken of."""

    def __init__(self, directory: str | Path, dtype: torch.dtype) -> None:
        self.config = json.loads((Path(directory) / "config.json").read_text())
        stored = load_file(Path(directory) / "model.safetensors")
        self.parameters = {name: t.to(dtype).requires_grad_() for name, t in stored.items()}

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, S] to [B, S, V]."""
        hidden = self.parameters["model.embed_tokens.weight"][tokens]
        for i, block in enumerate(self.config["block_configs"]):
            hidden = self._layer(f"model.layers.{i}", block, hidden)
        return self._norm("model.norm", hidden) @ self.parameters["lm_head.weight"].T

    def _layer(self, layer: str, block: dict[str, Any], hidden: Tensor) -> Tensor:
        attention, ffn = block["attention"], block["ffn"]
        if not attention["no_op"]:
            normed = self._norm(f"{layer}.input_layernorm", hidden)
            if attention["replace_with_linear"]:
                hidden = hidden + self._linear(f"{layer}.self_attn.linear_attn", normed)
            else:
                hidden = hidden + self._attention(f"{layer}.self_attn", attention, normed)
        if not ffn["no_op"]:
            normed = self._norm(f"{layer}.post_attention_layernorm", hidden)
            if ffn["replace_with_linear"]:
                return hidden + self._linear(f"{layer}.mlp.linear_mlp", normed)
            gate = self._linear(f"{layer}.mlp.gate_proj", normed)
            up = self._linear(f"{layer}.mlp.up_proj", normed)
            hidden = hidden + self._linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return hidden

    def _attention(self, name: str, attention: dict[str, Any], hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        width, group = self.config["head_dim"], attention["n_heads_in_group"]
        q, k, v = (
            self._linear(f"{name}.{x}_proj", hidden).view(batch, length, -1, width).transpose(1, 2)
            for x in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self._linear(f"{name}.o_proj", (probabilities @ v).transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), self._frequencies())
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _frequencies(self) -> Tensor:
        """Llama 3.1's frequencies, in float32 as everywhere."""
        rope, width = self.config["rope_scaling"], self.config["head_dim"]
        plain = 1.0 / (self.config["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        wavelength = 2 * math.pi / plain
        original = rope["original_max_position_embeddings"]
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        smooth = (original / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = (1 - smooth) * plain / rope["factor"] + smooth * plain
        stretched = torch.where(wavelength > low, plain / rope["factor"], between)
        return torch.where(wavelength < high, plain, stretched)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.parameters[f"{name}.weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.parameters[f"{name}.weight"] * x * scale
