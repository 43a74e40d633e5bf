"""Llama (LlamaForCausalLM; also Nemotron Nano 8B): GQA, RMSNorm, SwiGLU, RoPE with optional llama3 scaling."""

from __future__ import annotations

from sead_megatron.models.architecture import HFConfig, LayerConfig
from sead_megatron.models.config_reader import ConfigReader
from sead_megatron.models.decoder_weights import attention, attention_norm, gated_mlp, mlp_norm
from sead_megatron.models.family import Family, WeightTable


def _layer_weights(config: HFConfig, layer: LayerConfig) -> WeightTable:
    return attention(config, layer) | gated_mlp(config, layer) | attention_norm(config) | mlp_norm(config)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    read_layers=ConfigReader.uniform_layers,
    read_rope=lambda reader: reader.rope(("llama3",)),
    layer_weights=_layer_weights,
)
