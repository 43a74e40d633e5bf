"""Layers for machines without Transformer Engine: SDPA core attention and an RMSNorm.

Megatron's own local attention takes no packed sequences, and its local RMSNorm refuses sequence parallelism.
Both gaps are filled here with torch operators, so the same model runs on a CPU and on a plain CUDA machine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019) whose weight takes part in Megatron's sequence-parallel reduction.

    Under sequence parallelism every TP rank norms its own slice of the tokens, so the weight's gradient is
    partial: the flag makes `finalize_model_grads` sum it over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(torch.nn.Module):
    """Causal attention over `torch.nn.functional.scaled_dot_product_attention`.

    Takes `sbhd` tensors or packed `thd` ones with `PackedSeqParams`; an optional sliding window
    `config.window_size = (W - 1, 0)` lets a token see itself and the W - 1 tokens before it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError("SDPACoreAttention has no dropout; attention_dropout must be 0")
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"SDPACoreAttention is causal, got {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.window = _window_of_layer(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """`sbhd`: [S, B, heads, D] to [S, B, heads * D]; `thd`: [T, heads, D] to [T, heads * D].

        The mask argument is ignored: every caller is causal, and packing comes as `cu_seqlens`.
        """
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        segments = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        outputs = [self._attend(*(x.transpose(0, 1)[None] for x in qkv))[0] for qkv in segments]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, S, D] each (fewer heads in k and v are shared by groups of query heads)."""
        length = q.shape[-2]
        mask = None
        if self.window is not None and length > self.window:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < self.window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )


def _window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Number of visible tokens, or None for a full-attention layer. `layer_number` counts from 1."""
    if config.window_size is None:
        return None
    skip = getattr(config, "window_attn_skip_freq", None)
    if isinstance(skip, int) and skip > 0 and layer_number % skip == 0:
        return None
    if isinstance(skip, list) and not skip[layer_number - 1]:
        return None
    return int(config.window_size[0]) + 1
