"""How a model's weights lie in a Megatron distributed checkpoint. Torch-free.

Tensors are stored whole, whatever TP and PP wrote or will read them, under the names and global shapes of Megatron's
`sharded_state_dict`:
- layers that are all alike are stacked along a first axis under one name; where one differs each has its own name;
- a norm in front of a linear layer has the name that it has in Transformer Engine's fused layer;
- `linear_fc1` is [gate ; up] and `linear_qkv` goes by query groups, neither cut for any TP;
- rows of the vocabulary are padded; a tied output layer is not stored.

Every stored row is a row of one Hugging Face tensor or padding. `Segment`s say which, and serve both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sead_megatron.models.architecture import HFConfig, YarnRope
from sead_megatron.models.family import HFShapes, WeightMap, WeightRule, model_weights
from sead_megatron.models.layouts import (
    GateUp,
    GroupedQKV,
    LayoutOp,
    Replicated,
    Split,
    Vocabulary,
    padded_vocab_size,
)
from sead_megatron.models.registry import FAMILIES

CHUNK_BYTES = 32 << 20
# A rank of TP8 reads its columns of a row-parallel weight and little else.
_COLUMN_PIECES = 8
# Smaller pieces cost more in seeks and headers than they save in bytes.
_SMALLEST_PIECE = 1 / 32  # of a chunk


@dataclass(frozen=True)
class Segment:
    """Stored rows [start, start + rows) are rows [hf_start, hf_start + rows) of one Hugging Face tensor."""

    start: int
    rows: int
    hf_name: str
    hf_start: int


@dataclass(frozen=True)
class Box:
    """A rectangle of a stored tensor, or of one layer of a stack: rows and columns, each [start, stop).

    A vector has one column.
    """

    row_start: int
    row_stop: int
    column_start: int
    column_stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.row_stop - self.row_start

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.column_stop - self.column_start


@dataclass(frozen=True)
class StoredParameter:
    """One Megatron parameter of the unsharded model."""

    key: str
    layer: int | None
    """Its place along the first axis of a stack of layers; None where it has a name of its own."""
    layers: int
    """Length of that axis."""
    shape: tuple[int, ...]
    """Without that axis."""
    layout: LayoutOp
    hf_shapes: HFShapes
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """For people."""
        return self.key if self.layer is None else f"{self.key}[{self.layer}]"

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Of the stored tensor."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    @property
    def width(self) -> int:
        """Number of columns."""
        return math.prod(self.shape[1:])

    @property
    def hf_elements(self) -> int:
        """Elements of its Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())

    @property
    def extra_state_key(self) -> str | None:
        """Where Megatron's linear layers expect a state of theirs (of FP8; empty here); None for other modules."""
        module, _, parameter = self.key.rpartition(".")
        if parameter != "weight" or not module.rpartition(".")[2].startswith("linear"):
            return None
        shard = "shard_0_1" if self.layer is None else f"shard_{self.layer}_{self.layers}"
        return f"{module}._extra_state/{shard}"

    def offsets(self, box: Box) -> tuple[int, ...]:
        """Where a box begins in the stored tensor."""
        return self._in_stack(0 if self.layer is None else self.layer, box.row_start, box.column_start)

    def sizes(self, box: Box) -> tuple[int, ...]:
        """Extent of a box in the stored tensor."""
        return self._in_stack(1, box.rows, box.columns)

    def _in_stack(self, layer: int, row: int, column: int) -> tuple[int, ...]:
        inner = (row, column)[: len(self.shape)]
        return inner if self.layer is None else (layer, *inner)


def layers_are_stacked(config: HFConfig) -> bool:
    """Whether Megatron gives all layers one name (see `megatron_config.transformer_config`)."""
    scaling = config.rope.scaling
    scales_scores = isinstance(scaling, YarnRope) and scaling.attention_factor != 1
    kinds = {
        (layer.num_key_value_heads, layer.ffn_hidden_size, layer.has_attention, layer.mlp)
        for layer in config.layers
    }
    reach = {layer.attention for layer in config.layers}
    scaled = scales_scores and ("full" in reach or config.rope.scales_sliding_layers)
    plain = all(layer.has_attention and layer.mlp == "gated" for layer in config.layers)
    return len(kinds) == 1 and plain and not scaled


def stored_parameters(config: HFConfig, stacked: bool | None = None) -> list[StoredParameter]:
    """Every stored parameter of a model, in the order of the layers.

    `stacked`: how an existing checkpoint names its layers; by default as Megatron does.
    """
    stacked = layers_are_stacked(config) if stacked is None else stacked
    family = FAMILIES[config.architecture]
    weights = WeightMap(family, config)
    layers = []
    for number, layer in enumerate(config.layers):
        # A norm has a name for each layer spec; the fused one comes last and is that of checkpoints.
        names = {tuple(hf): name for name, (_, hf) in family.layer_weights(config, layer).items()}
        for name in names.values():
            rule = weights.rule(f"decoder.layers.{number}.{name}")
            place = number if stacked else None
            key = f"decoder.layers.{name}" if stacked else f"decoder.layers.{number}.{name}"
            layers.append(_parameter(key, rule, place, config))
    outside = {name: weights.rule(name) for name in model_weights(config)}
    first, *last = [
        _parameter(name, rule, None, config) for name, rule in outside.items() if not rule.is_tied_copy
    ]
    return [first, *layers, *last]


def _parameter(key: str, rule: WeightRule, layer: int | None, config: HFConfig) -> StoredParameter:
    names, shapes = list(rule.hf_shapes), list(rule.hf_shapes.values())
    rows = sum(shape[0] for shape in shapes)
    if isinstance(rule.layout, Vocabulary):
        rows = padded_vocab_size(config.vocab_size, 1)
    shape = (rows, *shapes[0][1:])
    segments = tuple(_segments(rule.layout, names, shapes))
    return StoredParameter(key, layer, config.num_layers, shape, rule.layout, dict(rule.hf_shapes), segments)


def _segments(layout: LayoutOp, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Iterator[Segment]:
    if isinstance(layout, Replicated | Split | Vocabulary):
        yield Segment(0, shapes[0][0], names[0], 0)
    elif isinstance(layout, GateUp):
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            yield Segment(number * shape[0], shape[0], name, 0)
    elif isinstance(layout, GroupedQKV):
        groups = shapes[1][0] // layout.head_dim
        start = 0
        for group in range(groups):
            for name, shape in zip(names, shapes, strict=True):
                rows = shape[0] // groups
                yield Segment(start, rows, name, group * rows)
                start += rows
    else:
        raise TypeError(f"no stored form of {type(layout).__name__}")


def chunks(parameter: StoredParameter, item_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> list[Box]:
    """The boxes that a parameter is written in, each at most `chunk_bytes` where one row or query group is.

    A reader of some rows or columns reads the chunks that it touches, whole: they are cut where ranks are cut, rows
    into powers of two and a row-parallel weight's columns too.
    """
    column_edges = _edges(parameter.width, 1, _column_pieces(parameter, item_bytes, chunk_bytes))
    size = parameter.shape[0] * parameter.width * item_bytes
    pieces = 1 << max(0, math.ceil(math.log2(size / chunk_bytes)))
    row_edges = _edges(parameter.shape[0], _rows_together(parameter), pieces)
    return [Box(*row, *column) for row in pairwise(row_edges) for column in pairwise(column_edges)]


def _rows_together(parameter: StoredParameter) -> int:
    """Rows that no cut separates."""
    if not isinstance(parameter.layout, GroupedQKV):
        return 1
    return parameter.shape[0] // (len(parameter.segments) // len(parameter.hf_shapes))


def _column_pieces(parameter: StoredParameter, item_bytes: int, chunk_bytes: int) -> int:
    if parameter.layout.partition_dim != 1:
        return 1
    pieces = _COLUMN_PIECES
    size = parameter.shape[0] * parameter.width * item_bytes
    while pieces > 1 and (parameter.width % pieces or size / pieces < chunk_bytes * _SMALLEST_PIECE):
        pieces //= 2
    return pieces


def _edges(size: int, unit: int, pieces: int) -> list[int]:
    units = size // unit
    pieces = min(pieces, units)
    return [number * units // pieces * unit for number in range(pieces + 1)]
