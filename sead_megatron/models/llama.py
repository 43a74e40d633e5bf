"""The Llama family (LlamaForCausalLM): GQA, RMSNorm, SwiGLU, RoPE with optional llama3 scaling."""

from __future__ import annotations

import re
from typing import Any

from sead_megatron.models.family import DECODER_LAYER as M
from sead_megatron.models.family import HF_LAYER as H
from sead_megatron.models.family import Family, HFShapes, WeightTable
from sead_megatron.models.hf_config import HFConfig
from sead_megatron.models.layouts import GateUp, GroupedQKV, Replicated, Split, Vocabulary


def weight_table(config: HFConfig) -> WeightTable:
    """Megatron parameter name -> (layout, Hugging Face names)."""
    qkv = GroupedQKV(config.head_dim, config.num_attention_heads)
    projections = [f"{H}.self_attn.{name}_proj" for name in "qkv"]
    input_norm = (Replicated(), [f"{H}.input_layernorm.weight"])
    mlp_norm = (Replicated(), [f"{H}.post_attention_layernorm.weight"])
    return {
        "embedding.word_embeddings.weight": (Vocabulary(), ["model.embed_tokens.weight"]),
        "output_layer.weight": (Vocabulary(), ["lm_head.weight"]),
        "decoder.final_layernorm.weight": (Replicated(), ["model.norm.weight"]),
        # A norm stands alone in the local layer spec and is fused into the linear layer in TE's.
        f"{M}.input_layernorm.weight": input_norm,
        f"{M}.self_attention.linear_qkv.layer_norm_weight": input_norm,
        f"{M}.pre_mlp_layernorm.weight": mlp_norm,
        f"{M}.mlp.linear_fc1.layer_norm_weight": mlp_norm,
        f"{M}.self_attention.linear_qkv.weight": (qkv, [f"{p}.weight" for p in projections]),
        f"{M}.self_attention.linear_proj.weight": (Split(1), [f"{H}.self_attn.o_proj.weight"]),
        f"{M}.mlp.linear_fc1.weight": (GateUp(), [f"{H}.mlp.gate_proj.weight", f"{H}.mlp.up_proj.weight"]),
        f"{M}.mlp.linear_fc2.weight": (Split(1), [f"{H}.mlp.down_proj.weight"]),
    }


def transformer_options(config: HFConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that this family sets beyond the common ones: none."""
    return {}


def hf_shapes(config: HFConfig) -> HFShapes:
    """Hugging Face name -> full shape, as in the state_dict of LlamaForCausalLM (a tied output layer left out)."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    vocabulary = (config.vocab_size, hidden)
    layer: HFShapes = {
        f"{H}.input_layernorm.weight": (hidden,),
        f"{H}.post_attention_layernorm.weight": (hidden,),
        f"{H}.self_attn.q_proj.weight": (queries, hidden),
        f"{H}.self_attn.k_proj.weight": (keys, hidden),
        f"{H}.self_attn.v_proj.weight": (keys, hidden),
        f"{H}.self_attn.o_proj.weight": (hidden, queries),
        f"{H}.mlp.gate_proj.weight": (ffn, hidden),
        f"{H}.mlp.up_proj.weight": (ffn, hidden),
        f"{H}.mlp.down_proj.weight": (hidden, ffn),
    }
    shapes: HFShapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    for number in range(config.num_layers):
        shapes |= {name.format(number): shape for name, shape in layer.items()}
    return shapes


# Early versions of transformers stored the rotary frequencies, which follow from config.json.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

LLAMA = Family("LlamaForCausalLM", weight_table, transformer_options, hf_shapes, _ROTARY_BUFFER)
