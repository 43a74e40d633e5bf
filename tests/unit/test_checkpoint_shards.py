"""Flat ranges as boxes, and work dealt over replicas: every element once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sead_megatron.training.checkpoint_shards import boxes_of_range, dealt_ranges


# One to four dimensions, leading ones (Megatron's stacked layers), one row, one column.
@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 3, 4), (1, 1, 5), (4, 1), (2, 3, 2, 2)])
def test_a_range_is_few_boxes(shape: tuple[int, ...]) -> None:
    """For every range: boxes in order, together the range, and at most 2N - 1 of them."""
    elements = torch.arange(math.prod(shape)).view(shape)
    for begin, end in itertools.combinations_with_replacement(range(elements.numel() + 1), 2):
        boxes = boxes_of_range(shape, begin, end)
        assert len(boxes) <= 2 * len(shape) - 1
        parts = []
        for offsets, sizes in boxes:
            part = elements[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            assert part.shape == sizes
            parts.append(part.flatten())
        flat = torch.cat(parts) if parts else elements.flatten()[:0]
        assert flat.tolist() == list(range(begin, end))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16])
def test_work_is_dealt_evenly(parts: int) -> None:
    sizes = [5, 1, 0, 40, 3]
    dealt = [dealt_ranges(sizes, parts, part) for part in range(parts)]
    counts = [sum(stop - start for start, stop in ranges) for ranges in dealt]
    assert max(counts) - min(counts) <= 1
    for number, size in enumerate(sizes):
        elements = [e for ranges in dealt for e in range(*ranges[number])]
        assert elements == list(range(size))
