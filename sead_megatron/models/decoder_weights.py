"""Parts of layer tables that families share. Names are relative to a layer, on both sides. Torch-free."""

from __future__ import annotations

from sead_megatron.models.architecture import HFConfig, LayerConfig
from sead_megatron.models.family import WeightTable
from sead_megatron.models.layouts import GateUp, GroupedQKV, Replicated, Split


def attention(config: HFConfig, layer: LayerConfig) -> WeightTable:
    """Grouped-query attention."""
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = layer.num_key_value_heads * config.head_dim
    projections = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
    }
    return {
        "self_attention.linear_qkv.weight": (
            GroupedQKV(config.head_dim, config.num_attention_heads),
            dict(projections),
        ),
        "self_attention.linear_proj.weight": (Split(1), {"self_attn.o_proj.weight": (hidden, queries)}),
    }


def gated_mlp(config: HFConfig, layer: LayerConfig) -> WeightTable:
    """SwiGLU."""
    hidden, ffn = config.hidden_size, layer.ffn_hidden_size
    return {
        "mlp.linear_fc1.weight": (
            GateUp(),
            {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
        ),
        "mlp.linear_fc2.weight": (Split(1), {"mlp.down_proj.weight": (hidden, ffn)}),
    }


def norm(hf_name: str, config: HFConfig, *megatron_names: str) -> WeightTable:
    """A norm over the hidden size, under every name that it has in one of the layer specs.

    A norm stands alone in the local spec; Transformer Engine's fuses it into the linear layer behind it.
    """
    return {name: (Replicated(), {hf_name: (config.hidden_size,)}) for name in megatron_names}


def attention_norm(config: HFConfig) -> WeightTable:
    """The norm before the attention."""
    return norm(
        "input_layernorm.weight",
        config,
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
    )


def mlp_norm(config: HFConfig) -> WeightTable:
    """The norm before the MLP."""
    return norm(
        "post_attention_layernorm.weight",
        config,
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
    )
