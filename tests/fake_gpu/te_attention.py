"""cuDNN's attention without cuDNN.

Transformer Engine chooses the backend itself, but for cuDNN's word that it can run a graph, which the fake cuDNN cannot
give. What attention is asked for is recorded and checked for what holds of every call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def install() -> set[str]:
    """Plays fused attention in this process; the returned set grows with each kind of call."""
    import transformer_engine.pytorch.attention.dot_product_attention.backends as backends
    import transformer_engine.pytorch.attention.dot_product_attention.utils as utils

    seen: set[str] = set()
    real = inspect.signature(backends.fused_attn_fwd)
    any_length = int(utils.FusedAttnBackend.F16_arbitrary_seqlen.value)
    utils._get_fused_attn_backend = lambda **options: (any_length, "")

    def forward(*arguments: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
        given = real.bind(*arguments, **options).arguments
        q, k, v = (given[name] for name in ("q", "k", "v"))
        lengths = [given[name] for name in ("cu_seqlens_q", "cu_seqlens_kv")]
        for tensor in (*lengths, q, k, v):
            assert tensor.is_cuda, f"attention was given a tensor on {tensor.device}"
        assert all(tensor.dtype == torch.int32 for tensor in lengths)
        how = [str(given.get(name)) for name in ("qkv_layout", "attn_mask_type", "window_size")]
        seen.add(" ".join([*how, str(q.dtype)]))
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        softmax = torch.empty(q.shape[0], q.shape[1], 1, dtype=torch.float32, device=q.device)
        return out, [softmax, torch.empty(2, dtype=torch.int64, device=q.device)]

    def backward(
        max_q: int,
        max_kv: int,
        cu_q: Tensor,
        cu_kv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Any,
        **options: Any,
    ) -> list[Tensor | None]:
        return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None]

    backends.fused_attn_fwd, backends.fused_attn_bwd = forward, backward
    return seen
