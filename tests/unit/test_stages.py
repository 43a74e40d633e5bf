"""Pipeline stages: the most even contiguous split."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.stages import balanced_split, layer_parameters, stage_layers
from tests.tiny_families import save_tiny_nemotron_nas


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_other_split_has_a_smaller_largest_stage(costs: list[int], parts: int) -> None:
    """Against every split there is, by largest stage and then by sum of squares."""
    if parts > len(costs):
        with pytest.raises(ValueError, match="cannot cut"):
            balanced_split(costs, parts)
        return

    def quality(sizes: tuple[int, ...]) -> tuple[int, int]:
        ends = [0, *itertools.accumulate(sizes)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max(sums), sum(x * x for x in sums)

    cuts = itertools.combinations(range(1, len(costs)), parts - 1)
    every = [tuple(b - a for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts]
    sizes = balanced_split(costs, parts)
    assert sum(sizes) == len(costs) and min(sizes) >= 1 and len(sizes) == parts
    assert quality(sizes) == min(map(quality, every))


def test_equal_layers_make_equal_stages_and_the_first_ones_take_the_rest() -> None:
    assert balanced_split([5] * 8, 4) == (2, 2, 2, 2)
    assert balanced_split([5] * 7, 2) == (4, 3)


def test_layers_are_weighed_by_their_parameters(tmp_path: Path) -> None:
    """Hidden 64, 8 heads of 8: attention with 4 KV heads has 64*64*2 + 2*32*64 weights and a norm."""
    config = read_hf_config(save_tiny_nemotron_nas(tmp_path / "model"))
    attention = {4: 2 * 64 * 64 + 2 * 32 * 64 + 64, 2: 2 * 64 * 64 + 2 * 16 * 64 + 64}
    linear = 64 * 64 + 64
    ffn = {width: 3 * width * 64 + 64 for width in (256, 768)}
    assert layer_parameters(config) == (
        attention[4] + ffn[256],
        ffn[768],
        linear + ffn[256],
        attention[2] + linear,
        attention[4],
        ffn[768],
    )
    assert stage_layers(config, 2) == (2, 4)
    assert stage_layers(config, 2, [5, 1]) == (5, 1)
