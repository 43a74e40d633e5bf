"""Builds the Megatron-core GPTModel of a Hugging Face config, for training or as a frozen scorer.

The model's product is the last hidden state after the final norm: [S, 1, H], or [S / TP, 1, H] under sequence
parallelism. Logits are never computed here; the loss kernel takes hidden states and output-layer shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from sead_megatron.models.architecture import HFConfig, Llama3Rope
from sead_megatron.models.family import WeightMap
from sead_megatron.models.fp8_shapes import row_multiple
from sead_megatron.models.layer_specs import block_spec
from sead_megatron.models.layouts import padded_vocab_size
from sead_megatron.models.megatron_config import transformer_config
from sead_megatron.models.precision import Precision
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.stages import stage_layers
from sead_megatron.parallel.groups import ParallelGroups
from sead_megatron.requirements import FUSED_GRADIENTS, is_importable


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
    row_multiple: int
    """What a row's length must be a multiple of: sequence parallelism cuts it evenly, FP8 takes no other shapes."""

    @property
    def vocab_start(self) -> int:
        """Global id of the first row of this rank's vocabulary shard."""
        return (
            self.groups.tp_rank
            * padded_vocab_size(self.config.vocab_size, self.groups.layout.tensor)
            // (self.groups.layout.tensor)
        )


def build_model(
    config: HFConfig,
    groups: ParallelGroups,
    precision: Precision,
    *,
    on_cpu: bool,
    trainable: bool,
    sequence_parallel: bool = False,
    recompute: bool = False,
    stages: Sequence[int] | None = None,
) -> BuiltModel:
    """This rank's shard of the model with undefined weights (see `sead_megatron.models.load`).

    A frozen model gets no output layer: its rows are held by the student's ranks, in the student's layout.
    `stages`: layers of each pipeline stage, by default balanced by parameters.
    """
    stages = stage_layers(config, groups.layout.pipeline, stages)
    megatron = transformer_config(
        config,
        groups,
        precision,
        stages,
        on_cpu=on_cpu,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
    )
    offset = sum(stages[: groups.pp_rank])
    layers = range(offset, offset + stages[groups.pp_rank])
    scaling = config.rope.scaling
    # Without gradients Transformer Engine keeps no transposed copy of FP8 weights (its pull request 1847).
    with torch.set_grad_enabled(trainable):
        module = HiddenStateModel(
            megatron,
            block_spec(
                config, megatron, groups.collection, layers, on_cpu=on_cpu, modelopt=precision.modelopt
            ),
            vocab_size=padded_vocab_size(config.vocab_size, groups.layout.tensor),
            max_sequence_length=config.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=config.tie_word_embeddings and trainable,
            position_embedding_type="rope",
            rotary_base=config.rope.theta,
            rope_scaling=isinstance(scaling, Llama3Rope),
            rope_scaling_factor=scaling.factor if isinstance(scaling, Llama3Rope) else 1.0,
            pg_collection=groups.collection,
        )
    if not trainable:
        module.output_layer = None
        module.requires_grad_(False)
        module.eval()
    if not on_cpu:
        module.cuda(torch.cuda.current_device())
        if trainable:
            _fuse_gradient_accumulation(module)
    weights = WeightMap(FAMILIES[config.architecture], config, offset)
    _mark_tensor_parallel_parameters(module, weights)
    multiple = row_multiple(precision.fp8_recipe, groups.layout.tensor, sequence_parallel=sequence_parallel)
    return BuiltModel(module, config, groups, weights, multiple)


def _fuse_gradient_accumulation(module: HiddenStateModel) -> None:
    """Lets the decoder's linear layers add weight gradients to the float32 buffers in the GEMM itself.

    Transformer Engine's layers bring that, Megatron's own need apex. Not Megatron's option: it concerns the output
    layer too, which raises at construction without apex and is never run here (0.16.1, 0.19.2). Both kinds of layers
    read these attributes in each forward pass.
    """
    with_apex = is_importable(FUSED_GRADIENTS)
    for layer in module.decoder.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True
        elif with_apex and isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            layer.gradient_accumulation_fusion = True


def _mark_tensor_parallel_parameters(module: torch.nn.Module, weights: WeightMap) -> None:
    """Tells Megatron which parameters are shards.

    Its initialisers do that, and they are skipped here. An unmarked shard counts as a duplicate on TP ranks > 0 and
    drops out of the gradient norm (0.38 instead of 0.53 on a tiny model at TP2, megatron-core 0.16.1; 0.19.2 marks its
    layers without them).
    """
    for name, parameter in module.named_parameters():
        dim = weights.rule(name).layout.partition_dim
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
