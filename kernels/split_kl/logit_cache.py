"""Tiles of logits that are kept from pass 1 to pass 2, up to a budget of bytes: memory for time.

Pass 2 computes the logits of both models again, 2 of the 6 GEMMs that a loss takes. Every tile that fits the
budget saves its share of them. Off by default (``TileOptions.cache_mib``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import Workspace, tile_bytes


class LogitCache:
    """Pairs of student and teacher tiles by their place.

    It knows places, not tokens: one object for one pass 1 and one pass 2 over the same inputs.
    """

    def __init__(self, mebibytes: int) -> None:
        self._bytes_left = mebibytes * 2**20
        self._tiles: dict[tuple[int, int, int, int], list[Tensor]] = {}

    def reserve(
        self, window: slice, rows: slice, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor] | None:
        """Two tiles to fill, which the other methods will find again; None if they no longer fit the budget."""
        shape = rows.stop - rows.start, window.stop - window.start
        size = 2 * tile_bytes(*shape, dtype)
        if size > self._bytes_left:
            return None
        self._bytes_left -= size
        tiles = Workspace(*shape, device, [dtype, dtype]).views(*shape)
        self._tiles[_place(window, rows)] = tiles
        return tiles

    def look(self, window: slice, rows: slice) -> list[Tensor] | None:
        """The two tiles of this place, still kept; None where they are not."""
        return self._tiles.get(_place(window, rows))

    def take(self, window: slice, rows: slice) -> list[Tensor] | None:
        """The two tiles of this place, no longer kept; None where they were not."""
        return self._tiles.pop(_place(window, rows), None)


def _place(window: slice, rows: slice) -> tuple[int, int, int, int]:
    return window.start, window.stop, rows.start, rows.stop
