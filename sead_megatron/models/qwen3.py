"""Qwen3, dense (Qwen3ForCausalLM): Llama with an RMSNorm over every head of queries and keys."""

from __future__ import annotations

from sead_megatron.models.architecture import HFConfig, LayerConfig
from sead_megatron.models.config_reader import ConfigReader
from sead_megatron.models.decoder_weights import attention, attention_norm, gated_mlp, mlp_norm
from sead_megatron.models.family import Family, WeightTable
from sead_megatron.models.layouts import Replicated


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    reader.refuse("use_sliding_window", "not supported for this architecture")
    kinds = reader.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) != {"full_attention"}):
        raise reader.error("layer_types", kinds, 'must all be "full_attention"', "use another model")
    return reader.uniform_layers()


def _layer_weights(config: HFConfig, layer: LayerConfig) -> WeightTable:
    head_norms: WeightTable = {
        f"self_attention.{x}_layernorm.weight": (
            Replicated(),
            {f"self_attn.{x}_norm.weight": (config.head_dim,)},
        )
        for x in "qk"
    }
    norms = attention_norm(config) | mlp_norm(config) | head_norms
    return attention(config, layer) | gated_mlp(config, layer) | norms


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    read_layers=_read_layers,
    read_rope=ConfigReader.rope,
    layer_weights=_layer_weights,
    qk_norm="head",
)
