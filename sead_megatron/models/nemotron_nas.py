"""Nemotron-NAS (DeciLMForCausalLM; Llama-3.3-Nemotron-Super-49B): Llama whose layers differ, as found by Puzzle
(arXiv 2411.19146): other numbers of KV heads and FFN widths, sublayers left out or replaced by a matrix."""

from __future__ import annotations

from sead_megatron.models.architecture import AttentionKind, HFConfig, LayerConfig, MLPKind
from sead_megatron.models.config_reader import ConfigReader
from sead_megatron.models.decoder_weights import attention, attention_norm, gated_mlp, mlp_norm, norm
from sead_megatron.models.family import Family, WeightTable
from sead_megatron.models.layouts import Split

# Variants of a block that no published checkpoint uses and that would compute something else.
_ATTENTION_VARIANTS = (
    *("window_length", "num_sink_tokens", "sparsify", "unshifted_sink", "llama4", "mamba"),
    "use_prefill_window_in_sink_attention",
)
_FFN_VARIANTS = ("sparsify", "moe")


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    blocks = reader.sections("block_configs")
    if len(blocks) != reader.integer("num_hidden_layers"):
        constraint = (
            f"must have one entry for each of num_hidden_layers ({reader.integer('num_hidden_layers')})"
        )
        raise reader.error("block_configs", f"{len(blocks)} entries", constraint)
    heads, _ = reader.heads()
    hidden_size = reader.integer("hidden_size")
    return tuple(
        LayerConfig(
            *_read_attention(block.section("attention"), heads), *_read_ffn(block.section("ffn"), hidden_size)
        )
        for block in blocks
    )


def _read_attention(block: ConfigReader, heads: int) -> tuple[AttentionKind, int]:
    if block.flag("no_op"):
        return "none", 0
    if block.flag("replace_with_linear"):
        return "linear", 0
    for key in _ATTENTION_VARIANTS:
        block.refuse(key, "not supported")
    group = block.integer("n_heads_in_group")
    if heads % group:
        raise block.error("n_heads_in_group", group, f"must divide num_attention_heads ({heads})")
    return "full", heads // group


def _read_ffn(block: ConfigReader, hidden_size: int) -> tuple[MLPKind, int]:
    if block.flag("no_op"):
        return "none", 0
    if block.flag("replace_with_linear"):
        return "linear", 0
    for key in _FFN_VARIANTS:
        block.refuse(key, "not supported")
    block.require("hidden_act", "silu")
    block.require("gated", True)
    given = block.raw.get("intermediate_size") is not None
    if given and block.raw.get("ffn_mult") is None:
        return "gated", block.integer("intermediate_size")
    width = ffn_width(block.number("ffn_mult"), hidden_size)
    if given and block.integer("intermediate_size") != width:
        constraint = f"ffn_mult ({block.number('ffn_mult'):g}) makes it {width}"
        raise block.error("intermediate_size", block.integer("intermediate_size"), constraint)
    return "gated", width


def ffn_width(multiplier: float, hidden_size: int) -> int:
    """Width of an FFN of `ffn_mult`: 2/3 of its share of H, rounded up to a multiple of 256."""
    return -(-int(2 * multiplier * hidden_size / 3) // 256) * 256


def _layer_weights(config: HFConfig, layer: LayerConfig) -> WeightTable:
    table: WeightTable = {}
    matrix = (config.hidden_size, config.hidden_size)
    if layer.has_attention:
        table |= attention(config, layer) | attention_norm(config)
    elif layer.attention == "linear":
        table["self_attention.linear.weight"] = (Split(0), {"self_attn.linear_attn.weight": matrix})
        table |= norm(
            "input_layernorm.weight",
            config,
            "input_layernorm.weight",
            "self_attention.linear.layer_norm_weight",
        )
    if layer.mlp == "gated":
        table |= gated_mlp(config, layer) | mlp_norm(config)
    elif layer.mlp == "linear":
        table["mlp.linear.weight"] = (Split(0), {"mlp.linear_mlp.weight": matrix})
        table |= norm(
            "post_attention_layernorm.weight",
            config,
            "pre_mlp_layernorm.weight",
            "mlp.linear.layer_norm_weight",
        )
    return table


def _engine_limit(config: HFConfig) -> str | None:
    """What vLLM 0.32's nemotron_nas.py does not compute."""
    if not config.layers[0].has_attention:
        return "its first layer has no attention"
    if any("linear" in (layer.attention, layer.mlp) for layer in config.layers):
        return "it has sublayers that are replaced by a matrix"
    return None


NEMOTRON_NAS = Family(
    architecture="DeciLMForCausalLM",
    read_layers=_read_layers,
    read_rope=lambda reader: reader.rope(("llama3",)),
    layer_weights=_layer_weights,
    engine_limit=_engine_limit,
)
