"""Megatron's TransformerConfig of a model in one layout, layer by layer and stage by stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from sead_megatron.models.architecture import HFConfig, LayerConfig, YarnRope
from sead_megatron.models.precision import Precision
from sead_megatron.models.registry import FAMILIES
from sead_megatron.parallel.groups import ParallelGroups
from sead_megatron.requirements import is_importable


class StageLayout(PipelineParallelLayerLayout):
    """Layers of each pipeline stage, as seen from one stage.

    Megatron's own class asks `parallel_state` for the rank, which knows the student's only (0.16.1 and 0.19.2).
    """

    def __init__(self, stages: Sequence[int], pp_rank: int) -> None:
        rows: list[list[LayerType]] = [[LayerType.decoder] * layers for layers in stages]
        rows[0].insert(0, LayerType.embedding)
        rows[-1].append(LayerType.loss)
        super().__init__(rows, len(rows))
        self._stages = tuple(stages)
        self._pp_rank = pp_rank

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Decoder layers of a stage; of this one by default."""
        if layer_type != LayerType.decoder:
            return super().get_num_layers_to_build(layer_type, vp_stage, self._rank(pp_rank))
        return self._stages[self._rank(pp_rank)]

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Decoder layers before a stage; before this one by default."""
        if layer_type != LayerType.decoder:
            return super().get_layer_offset(layer_type, vp_stage, self._rank(pp_rank))
        return sum(self._stages[: self._rank(pp_rank)])

    def _rank(self, pp_rank: int | None) -> int:
        return self._pp_rank if pp_rank is None else pp_rank


@dataclass
class LayeredTransformerConfig(TransformerConfig):
    """A TransformerConfig whose layers differ.

    Megatron builds each layer with `get_config_for_layer` when `heterogeneous_block_specs` is set, as its own
    HeterogeneousTransformerConfig does; that one knows nothing of attention factors and validates every layer anew.
    """

    layer_overrides: list[dict[str, Any]] = field(default_factory=list)
    """Fields of each layer that differ from the model's, from the first layer of the model on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heterogeneous_block_specs = True

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """The config of a layer; `layer_number` counts from 1."""
        config = copy.copy(self)
        for name, value in self.layer_overrides[layer_number - 1].items():
            setattr(config, name, value)
        return config


def uses_transformer_engine(on_cpu: bool) -> bool:
    """Whether models are built of Transformer Engine's layers."""
    return not on_cpu and is_importable("transformer_engine")


def transformer_config(
    config: HFConfig,
    groups: ParallelGroups,
    precision: Precision,
    stages: Sequence[int],
    *,
    on_cpu: bool,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> TransformerConfig:
    """Megatron's TransformerConfig of a model on this rank; `stages`: layers of each pipeline stage."""
    layout = groups.layout
    fused = uses_transformer_engine(on_cpu)
    options = precision.megatron_options()
    if recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if layout.pipeline > 1:
        options["pipeline_model_parallel_layout"] = StageLayout(stages, groups.pp_rank)
    if config.sliding_window is not None:
        options["window_size"] = (config.sliding_window - 1, 0)
        options["window_attn_skip_freq"] = [int(layer.attention == "sliding") for layer in config.layers]
    overrides = [_layer_override(config, layer) for layer in config.layers]
    uniform = all(override == {} for override in overrides)
    build = TransformerConfig if uniform else LayeredTransformerConfig
    if not uniform:
        options["layer_overrides"] = overrides
    return build(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=max(config.key_value_heads, default=config.num_attention_heads),
        kv_channels=config.head_dim,
        ffn_hidden_size=max(config.ffn_hidden_sizes, default=config.hidden_size),
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        # Says that q_layernorm and k_layernorm are replicated, and their gradients summed over TP; a full-width norm
        # is sharded and has other names.
        qk_layernorm=FAMILIES[config.architecture].qk_norm == "head",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=sequence_parallel,
        # Weights are loaded before the first use: random values would be wasted work.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        variable_seq_lengths=True,
        # Dense models have no dispatcher, yet Megatron refuses variable lengths with its default one.
        moe_token_dispatcher_type="alltoall",
        # The objective divides by its own global normaliser, so Megatron must not average again.
        calculate_per_token_loss=True,
        # `sead_megatron.models.build` turns it on layer by layer: not for the output layer.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        **options,
    )


def _layer_override(config: HFConfig, layer: LayerConfig) -> dict[str, Any]:
    """How a layer's config differs from the model's; empty in a uniform model."""
    override: dict[str, Any] = {}
    if layer.has_attention and len(config.key_value_heads) > 1:
        override["num_query_groups"] = layer.num_key_value_heads
    if layer.mlp == "gated" and len(config.ffn_hidden_sizes) > 1:
        override["ffn_hidden_size"] = layer.ffn_hidden_size
    if not layer.has_attention or layer.mlp != "gated":
        # No other field, but Megatron must give the layer a name of its own in checkpoints.
        override["heterogeneous_block_specs"] = True
    scaling = config.rope.scaling
    if isinstance(scaling, YarnRope) and scaling.attention_factor != 1 and has_yarn(config, layer):
        # Rotation is linear: a factor on cosines and sines of queries and keys is its square on the scores.
        override["softmax_scale"] = scaling.attention_factor**2 / math.sqrt(config.head_dim)
    return override


def has_yarn(config: HFConfig, layer: LayerConfig) -> bool:
    """Whether a layer's rotary embedding is scaled by YaRN."""
    scaled = layer.attention == "full" or (layer.attention == "sliding" and config.rope.scales_sliding_layers)
    return isinstance(config.rope.scaling, YarnRope) and scaled
