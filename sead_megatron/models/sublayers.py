"""Sublayers that Megatron-core does not have, made of the column-parallel layer and the norm of either layer spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sead_megatron.models.architecture import YarnRope
from sead_megatron.models.yarn import yarn_angles


class LinearSublayer(MegatronModule):
    """One [H, H] matrix in the place of an attention or an MLP (Nemotron-NAS).

    Megatron's own replacement asks `parallel_state` for its group, which knows the student's only.
    """

    def __init__(
        self, config: TransformerConfig, linear: type, buffer_name: str, tp_group: dist.ProcessGroup, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.linear = linear(
            config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=buffer_name,
            tp_group=tp_group,
        )

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[S, B, H] to [S, B, H] ([S / TP, B, H] under sequence parallelism); further arguments are ignored."""
        columns, _ = self.linear(hidden)
        output = gather_from_tensor_model_parallel_region(columns, group=self.tp_group)
        if self.config.sequence_parallel:
            output = scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return output, None


class NormedResidualAdd(torch.nn.Module):
    """residual + norm(sublayer output), in the place of Megatron's bias-dropout-add (OLMo-3; no bias, no dropout)."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Megatron asks for the function of this mode, then calls it with ((output, bias), residual, dropout)."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        return residual + self.norm(output_with_bias[0])


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: every rank uses the sum for its own shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class ShardedRMSNorm(torch.nn.Module):
    """RMSNorm over a dimension that is cut over TP ranks; the weight is this rank's part.

    The sum of squares is all-reduced in float32 (float64 for float64 inputs), forward and backward.
    """

    def __init__(
        self, local_size: int, eps: float, config: TransformerConfig, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = tp_group
        self.full_size = local_size * tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(local_size, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., local size] to the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        squares = wide.pow(2).sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.tp_group)
        return (self.weight * (wide * torch.rsqrt(squares / self.full_size + self.eps))).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """For Megatron's distributed checkpoint: the weight is cut along its only dimension."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


@dataclass(frozen=True)
class LayerRope:
    """The rotary embedding of one layer where it is not the model's."""

    scaling: YarnRope
    theta: float


class FullWidthNormAttention(SelfAttention):
    """Self-attention with an RMSNorm over all query heads together and one over all key heads (OLMo-3).

    `rope` replaces the model's rotary embedding in this layer: Megatron has one a model. The norms are not called
    q_layernorm and k_layernorm, because Megatron sums the gradients of what is called so over TP ranks.
    """

    def __init__(self, *args: Any, rope: LayerRope | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rope = rope
        width, group = self.hidden_size_per_attention_head, self.pg_collection.tp
        eps = self.config.layernorm_epsilon
        self.q_norm = ShardedRMSNorm(width * self.num_attention_heads_per_partition, eps, self.config, group)
        self.k_norm = ShardedRMSNorm(width * self.num_query_groups_per_partition, eps, self.config, group)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries [S, B, heads, D], normed keys and values [S, B, KV heads, D] of this rank."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query = self.q_norm(query.flatten(-2)).view(query.shape)
        key = self.k_norm(key.flatten(-2)).view(key.shape)
        return query, key, value

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's SelfAttention."""
        angles = kwargs.get("rotary_pos_emb")
        if self._rope is not None and angles is not None:
            kwargs["rotary_pos_emb"] = yarn_angles(
                self._rope.scaling,
                self._rope.theta,
                self.hidden_size_per_attention_head,
                angles.shape[0],
                angles.device,
            )
        return super().forward(hidden_states, attention_mask, *args, **kwargs)
