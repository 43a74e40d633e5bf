"""OLMo-3 (Olmo3ForCausalLM): norms after the sublayers, RMSNorm over all query and all key heads together, a
sliding window in three of four layers, YaRN on the others."""

from __future__ import annotations

from dataclasses import replace

from sead_megatron.models.architecture import AttentionKind, HFConfig, LayerConfig, Rope
from sead_megatron.models.config_reader import ConfigReader
from sead_megatron.models.decoder_weights import attention, gated_mlp, norm
from sead_megatron.models.family import Family, WeightTable
from sead_megatron.models.layouts import Split

_KINDS: dict[object, AttentionKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    uniform = reader.uniform_layers()
    given = reader.raw.get("layer_types")
    if given is None:  # the rule of transformers' Olmo3Config
        given = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(len(uniform))]
    if not isinstance(given, list) or len(given) != len(uniform) or not set(given) <= _KINDS.keys():
        constraint = f'must be {len(uniform)} times "full_attention" or "sliding_attention"'
        raise reader.error("layer_types", given, constraint)
    return tuple(
        LayerConfig(_KINDS[kind], layer.num_key_value_heads, layer.mlp, layer.ffn_hidden_size)
        for kind, layer in zip(given, uniform, strict=True)
    )


def _read_rope(reader: ConfigReader) -> Rope:
    """One rope for both kinds of layers, or (transformers 5) a section for each."""
    full = reader.rope_section().section("full_attention")
    if not full.raw:
        return reader.rope(("yarn",))
    sliding = reader.rope_section().section("sliding_attention")
    theta, scaling = full.number("rope_theta"), full.scaling(("yarn",))
    if sliding.number("rope_theta", theta) != theta:
        constraint = f"must be that of full_attention ({theta:g}): Megatron-core has one base a model"
        raise sliding.error("rope_theta", sliding.raw["rope_theta"], constraint, "use another model")
    sliding_scaling = sliding.scaling(("yarn",))
    if sliding_scaling not in (None, scaling):
        constraint = "must be that of full_attention, or default"
        raise sliding.error("rope_type", sliding.raw["rope_type"], constraint, "use another model")
    return Rope(theta, scaling, scales_sliding_layers=scaling is not None and sliding_scaling is not None)


def with_yarn_on_all_layers(config: HFConfig) -> HFConfig:
    """The model as some versions of transformers compute it; the same model where there is no sliding layer."""
    return replace(config, rope=replace(config.rope, scales_sliding_layers=True))


def _layer_weights(config: HFConfig, layer: LayerConfig) -> WeightTable:
    widths = {"q": config.num_attention_heads, "k": layer.num_key_value_heads}
    full_width_norms: WeightTable = {
        f"self_attention.{x}_norm.weight": (
            Split(0),
            {f"self_attn.{x}_norm.weight": (heads * config.head_dim,)},
        )
        for x, heads in widths.items()
    }
    attention_norm = norm("post_attention_layernorm.weight", config, "self_attn_bda.norm.weight")
    mlp_norm = norm("post_feedforward_layernorm.weight", config, "mlp_bda.norm.weight")
    norms = full_width_norms | attention_norm | mlp_norm
    return attention(config, layer) | gated_mlp(config, layer) | norms


OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    read_layers=_read_layers,
    read_rope=_read_rope,
    layer_weights=_layer_weights,
    norm_placement="after",
    qk_norm="full",
)
