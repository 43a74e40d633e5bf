"""What a model family has to say: its Megatron options and one declarative table of weight names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sead_megatron.models.hf_config import HFConfig
from sead_megatron.models.layouts import LayoutOp

DECODER_LAYER = "decoder.layers.{}"
HF_LAYER = "model.layers.{}"
WeightTable = dict[str, tuple[LayoutOp, list[str]]]
HFShapes = dict[str, tuple[int, ...]]

_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """One entry of the registry (`sead_megatron.models.registry.FAMILIES`)."""

    architecture: str
    weight_table: Callable[[HFConfig], WeightTable]
    transformer_options: Callable[[HFConfig], dict[str, Any]]
    hf_shapes: Callable[[HFConfig], HFShapes]
    """Full shape of every Hugging Face tensor that `weight_table` reads, by name."""
    ignored_hf_names: re.Pattern[str]
    """Stored tensors that old checkpoints hold beside them, and that say nothing config.json does not."""


@dataclass(frozen=True)
class WeightRule:
    """How one local Megatron parameter maps to Hugging Face tensors."""

    layout: LayoutOp
    hf_names: Sequence[str]
    is_tied_copy: bool


class WeightMap:
    """Resolves the parameters of one pipeline stage against a family's table."""

    def __init__(self, family: Family, config: HFConfig, layer_offset: int) -> None:
        self.config = config
        self._table = family.weight_table(config)
        self._layer_offset = layer_offset

    def rule(self, parameter_name: str) -> WeightRule:
        """The rule of one local parameter; KeyError names a parameter that the family does not know."""
        match = _LOCAL_LAYER.match(parameter_name)
        if match is None:
            layout, names = self._table[parameter_name]
        else:
            layout, names = self._table[_LOCAL_LAYER.sub(DECODER_LAYER + ".", parameter_name)]
            names = [name.format(int(match.group(1)) + self._layer_offset) for name in names]
        # With PP > 1 a tied output layer is a copy on the last stage: loaded from the embedding, never exported.
        tied = parameter_name == "output_layer.weight" and self.config.tie_word_embeddings
        return WeightRule(layout, self._table["embedding.word_embeddings.weight"][1] if tied else names, tied)
