"""What a model family has to say: how to read its config.json, its layers' traits, and one declarative table of
weights. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sead_megatron.models.architecture import HFConfig, LayerConfig, Rope
from sead_megatron.models.config_reader import ConfigReader
from sead_megatron.models.layouts import LayoutOp, Replicated, Vocabulary

HFShapes = dict[str, tuple[int, ...]]
WeightTable = dict[str, tuple[LayoutOp, HFShapes]]
"""Megatron parameter name -> (layout, Hugging Face tensors that it is made of, by name and with full shape).
Names of layer tables are relative to the layer."""

_MEGATRON_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
# Early versions of transformers stored the rotary frequencies, which follow from config.json.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _serves_everything(config: HFConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """One entry of the registry (`sead_megatron.models.registry.FAMILIES`)."""

    architecture: str
    read_layers: Callable[[ConfigReader], tuple[LayerConfig, ...]]
    read_rope: Callable[[ConfigReader], Rope]
    layer_weights: Callable[[HFConfig, LayerConfig], WeightTable]
    norm_placement: Literal["before", "after"] = "before"
    """Where a sublayer's norm stands: x + f(norm(x)) or x + norm(f(x))."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: over each head, or over all heads together."""
    engine_limit: Callable[[HFConfig], str | None] = _serves_everything
    """Why vLLM cannot serve a model of this family, or None."""


def model_weights(config: HFConfig) -> WeightTable:
    """The tensors outside the layers, which all families share (the output layer also where it is tied)."""
    vocabulary = (config.vocab_size, config.hidden_size)
    output = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return {
        "embedding.word_embeddings.weight": (Vocabulary(), {"model.embed_tokens.weight": vocabulary}),
        "output_layer.weight": (Vocabulary(), {output: vocabulary}),
        "decoder.final_layernorm.weight": (Replicated(), {"model.norm.weight": (config.hidden_size,)}),
    }


@dataclass(frozen=True)
class WeightRule:
    """How one Megatron parameter maps to Hugging Face tensors."""

    layout: LayoutOp
    hf_shapes: HFShapes
    is_tied_copy: bool = False
    """An output layer that repeats the embedding: loaded from it, never exported."""

    @property
    def hf_names(self) -> Sequence[str]:
        """Names of the Hugging Face tensors, in the layout's order."""
        return list(self.hf_shapes)


class WeightMap:
    """Resolves Megatron parameters against a family's tables."""

    def __init__(self, family: Family, config: HFConfig, layer_offset: int = 0) -> None:
        self.config = config
        self._model = model_weights(config)
        self._layers = [family.layer_weights(config, layer) for layer in config.layers]
        self._layer_offset = layer_offset

    def rule(self, parameter_name: str) -> WeightRule:
        """The rule of a parameter of the stage at `layer_offset`; KeyError names one that the family does not
        have."""
        match = _MEGATRON_LAYER.match(parameter_name)
        if match is None:
            layout, shapes = self._model[parameter_name]
            tied = parameter_name == "output_layer.weight" and self.config.tie_word_embeddings
            return WeightRule(layout, shapes, tied)
        number = int(match.group(1)) + self._layer_offset
        layout, shapes = self._layers[number][match.group(2)]
        return WeightRule(layout, {_of_layer(number, name): shape for name, shape in shapes.items()})

    def hf_shapes(self) -> HFShapes:
        """Every Hugging Face tensor of the model, with its full shape, in the order of the layers."""
        return dict(self._all_shapes())

    def _all_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for _, shapes in self._model.values():
            yield from shapes.items()
        for number, table in enumerate(self._layers):
            for _, shapes in table.values():
                yield from ((_of_layer(number, name), shape) for name, shape in shapes.items())


def is_ignored(config: HFConfig, name: str) -> bool:
    """True for a stored tensor that says nothing the others and config.json do not: it may be left out."""
    is_tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return is_tied_copy or _ROTARY_BUFFER.fullmatch(name) is not None


def _of_layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"
