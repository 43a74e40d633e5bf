"""The Llama family (LlamaForCausalLM): GQA, RMSNorm, SwiGLU, RoPE with optional llama3 scaling."""

from __future__ import annotations

from typing import Any

from sead_megatron.models.family import DECODER_LAYER as M
from sead_megatron.models.family import HF_LAYER as H
from sead_megatron.models.family import Family, WeightTable
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


LLAMA = Family("LlamaForCausalLM", weight_table, transformer_options)
