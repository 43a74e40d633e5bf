"""CUDA operators that the CPU has under another name, or in parts.

Fused attention is computed by the CPU's flash kernel, RMSNorm's backward by the operators that the CPU makes it of.
Each function takes the arguments of a CUDA operator as CPU tensors. Where it returns None, the value is one that only
the CUDA kernels exchange among themselves (seeds, lengths), and the real operator's stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_LSE_MULTIPLE = 32  # the memory-efficient kernel pads its log-sum-exp


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError("attention dropout")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """[B, heads, S, D] each; the output and its log-sum-exp [B, heads, S]."""
    group = query.shape[1] // key.shape[1]
    shared = (x.repeat_interleave(group, dim=1) for x in (key, value))
    output, lse = _forward(query, *shared, 0.0, is_causal, attn_mask=mask, scale=scale)
    return output, lse


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, mask: Tensor | None,
    is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    group = query.shape[1] // key.shape[1]
    shared = (x.repeat_interleave(group, dim=1) for x in (key, value))
    lse = lse[..., : query.shape[2]].contiguous()
    dq, dk, dv = _backward(grad, query, *shared, output, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)


def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention`."""
    _no_dropout(dropout_p)
    return (*_attend(query, key, value, None, is_causal, scale), *(None,) * 7)


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, cum_q: Any, cum_k: Any,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, seed: Any, offset: Any, *, scale: float | None = None
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention_backward`."""
    return _gradients(grad, query, key, value, output, lse, None, is_causal, scale)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_efficient_attention`."""
    _no_dropout(dropout_p)
    output, lse = _attend(query, key, value, attn_bias, is_causal, scale)
    padded = F.pad(lse, (0, -lse.shape[-1] % _LSE_MULTIPLE)) if compute_log_sumexp else None
    return output, padded, None, None


def efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, output: Tensor, lse: Tensor,
    seed: Any, offset: Any, dropout_p: float, mask: list[bool], is_causal: bool = False, *, scale: float | None = None
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_efficient_attention_backward`."""
    if mask[3]:
        raise NotImplementedError("the gradient of an attention bias")
    bias = attn_bias if attn_bias is not None and attn_bias.numel() else None
    return (*_gradients(grad, query, key, value, output, lse, bias, is_causal, scale), None)


def rms_norm_backward(
    grad: Tensor, given: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """`aten::_fused_rms_norm_backward`, in the order of autograd on the CPU, whose RMSNorm is made of parts."""
    last = tuple(range(-len(shape), 0))
    grad, values = (x.to(rstd.dtype) for x in (grad, given))
    of_weight = (grad * (values * rstd)).sum(tuple(range(given.dim() - len(shape))))
    of_norm = grad if weight is None else grad * weight.to(rstd.dtype)
    of_mean_square = (of_norm * values).sum(last, keepdim=True) * (rstd.pow(3) * -0.5)
    of_values = of_norm * rstd + of_mean_square.expand_as(values) / math.prod(shape) * (values * 2.0)
    return of_values if mask[0] else None, of_weight if mask[1] else None


def mm_wide(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """`aten::mm.dtype`: a product of bfloat16 that is kept in float32. Products of bfloat16 are exact in float32."""
    return torch.mm(left.to(out_dtype), right.to(out_dtype), out=out)


def addmm_wide(
    added: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1,
    out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`aten::addmm.dtype`."""
    factors = (left.to(out_dtype), right.to(out_dtype))
    return torch.addmm(added.to(out_dtype), *factors, beta=beta, alpha=alpha, out=out)


SUBSTITUTES = {
    "mm.dtype": mm_wide,
    "mm.dtype_out": mm_wide,
    "addmm.dtype": addmm_wide,
    "addmm.dtype_out": addmm_wide,
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_fused_rms_norm_backward": rms_norm_backward,
}
