"""Which layers a pipeline stage holds: contiguous, and balanced by parameters. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.registry import FAMILIES


@cache
def layer_parameters(config: HFConfig) -> tuple[int, ...]:
    """Parameters of every decoder layer."""
    table = FAMILIES[config.architecture].layer_weights
    return tuple(
        # A norm stands in the table once for each layer spec, under one Hugging Face name.
        sum(
            {
                name: math.prod(shape)
                for _, hf in table(config, layer).values()
                for name, shape in hf.items()
            }.values()
        )
        for layer in config.layers
    )


def stage_layers(config: HFConfig, pipeline: int, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """Layers of each pipeline stage: `given`, or the most even split by parameters.

    Embedding and output layer do not count: one is a lookup, the other runs on response tokens only.
    """
    return tuple(given) if given is not None else _balanced_stages(config, pipeline)


@cache
def _balanced_stages(config: HFConfig, pipeline: int) -> tuple[int, ...]:
    return balanced_split(layer_parameters(config), pipeline)


def balanced_split(costs: Sequence[int], parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous, non-empty runs of `costs` whose largest sum is as small as can be.

    Among those, the split with the smallest sum of squares; among those, the one with the longest first runs.
    Raises ValueError with fewer costs than parts.
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(f"cannot cut {len(costs)} layers into {parts} stages")
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    largest = _smallest_maximum(ends, parts)
    # squares[n], sizes[n]: the best split of the first n layers into the parts so far.
    squares: list[float] = [0.0] + [math.inf] * len(costs)
    sizes: list[tuple[int, ...]] = [()] * (len(costs) + 1)
    for _ in range(parts):
        next_squares: list[float] = [math.inf] * (len(costs) + 1)
        next_sizes: list[tuple[int, ...]] = [()] * (len(costs) + 1)
        for end in range(1, len(costs) + 1):
            # Short last runs first, so that a tie keeps the longest first runs.
            for start in reversed(range(end)):
                cost = ends[end] - ends[start]
                if cost > largest:
                    break
                if squares[start] + cost * cost < next_squares[end]:
                    next_squares[end] = squares[start] + cost * cost
                    next_sizes[end] = (*sizes[start], end - start)
        squares, sizes = next_squares, next_sizes
    return sizes[-1]


def _smallest_maximum(ends: Sequence[int], parts: int) -> int:
    """The smallest possible largest part; `ends` are the running sums of the costs, from 0."""
    count = len(ends) - 1
    best = [ends[end] for end in range(count + 1)]
    for part in range(2, parts + 1):
        best = [0] * part + [
            min(max(best[start], ends[end] - ends[start]) for start in range(part - 1, end))
            for end in range(part, count + 1)
        ]
    return best[count]
