"""Builds the Megatron-core GPTModel of a Hugging Face config, for training or as a frozen scorer.

The model's product is the last hidden state after the final norm: [S, 1, H], or [S / TP, 1, H] under sequence
parallelism. Logits are never computed here; the loss kernel takes hidden states and output-layer shards.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from sead_megatron.models.family import WeightMap
from sead_megatron.models.hf_config import HFConfig
from sead_megatron.models.local_layers import LocalRMSNorm, local_layer_spec
from sead_megatron.models.registry import FAMILIES
from sead_megatron.parallel.groups import ParallelGroups

VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: a multiple of 128 (GEMM tiles) that the tensor-parallel size divides.

    The same for every TP that divides 128, so checkpoints move between layouts without reshaping.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel)
    return math.ceil(vocab_size / multiple) * multiple


class HiddenStateModel(GPTModel):
    """GPTModel that stops at the last hidden state."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the output layer, [padded vocabulary / TP, H] (the embedding's when tied)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


@dataclass(frozen=True)
class BuiltModel:
    """A model shard with what is needed to load, export and run it."""

    module: HiddenStateModel
    config: HFConfig
    groups: ParallelGroups
    weights: WeightMap

    @property
    def vocab_start(self) -> int:
        """Global id of the first row of this rank's vocabulary shard."""
        return (
            self.groups.tp_rank
            * padded_vocab_size(self.config.vocab_size, self.groups.layout.tensor)
            // (self.groups.layout.tensor)
        )


def transformer_config(
    config: HFConfig,
    groups: ParallelGroups,
    dtype: torch.dtype,
    *,
    on_cpu: bool,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> TransformerConfig:
    """Megatron's TransformerConfig of a Hugging Face config in one layout."""
    layout = groups.layout
    fused = not on_cpu and importlib.util.find_spec("transformer_engine") is not None
    recompute_options: dict[str, Any] = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if recompute
        else {}
    )
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are loaded before the first use: random values would be wasted work.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        variable_seq_lengths=True,
        # Dense models have no dispatcher, yet Megatron refuses variable lengths with its default one.
        moe_token_dispatcher_type="alltoall",
        # The objective divides by its own global normaliser, so Megatron must not average again.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        **recompute_options,
        **FAMILIES[config.architecture].transformer_options(config),
    )


def _layer_spec(megatron: TransformerConfig, groups: ParallelGroups, on_cpu: bool) -> ModuleSpec | Any:
    if not on_cpu and importlib.util.find_spec("transformer_engine") is not None:
        return get_gpt_layer_with_transformer_engine_spec()
    layers = get_num_layers_to_build(megatron, None, groups.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[local_layer_spec()] * layers, layer_norm=LocalRMSNorm)


def build_model(
    config: HFConfig,
    groups: ParallelGroups,
    dtype: torch.dtype,
    *,
    on_cpu: bool,
    trainable: bool,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> BuiltModel:
    """This rank's shard of the model with undefined weights (see `sead_megatron.models.load`).

    A frozen model gets no output layer: its rows are held by the student's ranks, in the student's layout.
    """
    megatron = transformer_config(
        config, groups, dtype, on_cpu=on_cpu, sequence_parallel=sequence_parallel, recompute=recompute
    )
    scaling = config.rope_scaling or {}
    module = HiddenStateModel(
        megatron,
        _layer_spec(megatron, groups, on_cpu),
        vocab_size=padded_vocab_size(config.vocab_size, groups.layout.tensor),
        max_sequence_length=config.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=config.tie_word_embeddings and trainable,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        rope_scaling=bool(scaling),
        rope_scaling_factor=scaling.get("factor", 1.0),
        pg_collection=groups.collection,
    )
    if not trainable:
        module.output_layer = None
        module.requires_grad_(False)
        module.eval()
    if not on_cpu:
        module.cuda(torch.cuda.current_device())
    offset = get_transformer_layer_offset(megatron, None, groups.pp_rank)
    weights = WeightMap(FAMILIES[config.architecture], config, offset)
    _mark_tensor_parallel_parameters(module, weights)
    return BuiltModel(module, config, groups, weights)


def _mark_tensor_parallel_parameters(module: torch.nn.Module, weights: WeightMap) -> None:
    """Tells Megatron which parameters are shards.

    Its initialisers do that, and they are skipped here. An unmarked shard counts as a duplicate on TP ranks > 0 and
    drops out of the gradient norm (0.38 instead of 0.53 on a tiny model at TP2, megatron-core 0.16.1).
    """
    for name, parameter in module.named_parameters():
        dim = weights.rule(name).layout.partition_dim
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
