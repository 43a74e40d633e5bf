"""The parameters that one rank holds of a model, in the order in which Megatron registers them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from sead_megatron.models.architecture import HFConfig, LayerConfig
from sead_megatron.models.family import WeightTable, model_weights
from sead_megatron.models.layouts import padded_vocab_size
from sead_megatron.models.registry import FAMILIES

# Of a decoder layer, as TransformerLayer and its parts create them (megatron-core 0.16.1 to 0.19.2). The order decides
# which parameters share a shard of the distributed optimizer.
_ORDER = (
    "input_layernorm.weight",
    "self_attention.linear.layer_norm_weight",
    "self_attention.linear.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.q_norm.weight",
    "self_attention.k_norm.weight",
    "self_attn_bda.norm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear.layer_norm_weight",
    "mlp.linear.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "mlp_bda.norm.weight",
)
_STANDS_ALONE = ("input_layernorm.weight", "pre_mlp_layernorm.weight")


@dataclass(frozen=True)
class ParameterShard:
    """One rank's part of a Megatron parameter."""

    name: str
    numel: int
    layer: int | None
    """Index of its decoder layer in the whole model; None outside the layers."""
    is_matrix: bool
    """A linear layer's weight inside a decoder layer: what FP8 applies to."""
    shares_embedding: bool = False
    """The tied output layer, or the embedding it is tied to, of a model with several stages."""


@cache
def stage_parameters(
    config: HFConfig, tensor: int, stages: tuple[int, ...], stage: int, *, trained: bool, fused_norms: bool
) -> tuple[ParameterShard, ...]:
    """What a rank of pipeline stage `stage` holds, the same for all its tensor-parallel ranks.

    A frozen model has no output layer (see `sead_megatron.models.build`). `fused_norms`: Transformer Engine's layers,
    whose norms are part of the linear layer behind them.
    """
    return tuple(_parameters(config, tensor, stages, stage, trained=trained, fused_norms=fused_norms))


def _parameters(
    config: HFConfig, tensor: int, stages: Sequence[int], stage: int, *, trained: bool, fused_norms: bool
) -> Iterator[ParameterShard]:
    first, last = stage == 0, stage == len(stages) - 1
    table = model_weights(config)
    vocabulary = padded_vocab_size(config.vocab_size, tensor) // tensor * config.hidden_size
    tied = config.tie_word_embeddings and trained
    shared = tied and len(stages) > 1
    if first:
        yield ParameterShard("embedding.word_embeddings.weight", vocabulary, None, False, shared)
    offset = sum(stages[:stage])
    for number in range(offset, offset + stages[stage]):
        for name, numel in layer_shards(config, config.layers[number], tensor, fused_norms=fused_norms):
            matrix = "norm" not in name
            yield ParameterShard(f"decoder.layers.{number - offset}.{name}", numel, number, matrix)
    if last:
        norm = next(iter(table["decoder.final_layernorm.weight"][1].values()))
        yield ParameterShard("decoder.final_layernorm.weight", math.prod(norm), None, False)
        if trained and not (tied and first):
            yield ParameterShard("output_layer.weight", vocabulary, None, False, shared)


def layer_shards(
    config: HFConfig, layer: LayerConfig, tensor: int, *, fused_norms: bool
) -> list[tuple[str, int]]:
    """(name, elements) of one tensor-parallel rank's parameters of a decoder layer, in Megatron's order."""
    table = FAMILIES[config.architecture].layer_weights(config, layer)
    wanted = {name for name in table if _belongs(name, table, fused_norms)}
    unknown = wanted - set(_ORDER)
    if unknown:
        raise ValueError(f"parameters without a place in the order: {sorted(unknown)}")
    found = []
    for name in sorted(wanted, key=_ORDER.index):
        layout, shapes = table[name]
        numel = sum(math.prod(shape) for shape in shapes.values())
        found.append((name, numel if layout.partition_dim is None else numel // tensor))
    return found


def _belongs(name: str, table: WeightTable, fused_norms: bool) -> bool:
    """A norm stands in the table once for each layer spec; which of the two names is this spec's?"""
    if name.endswith("layer_norm_weight"):
        return fused_norms
    return not (fused_norms and name in _STANDS_ALONE and any(k.endswith("layer_norm_weight") for k in table))
