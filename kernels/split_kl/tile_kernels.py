"""What a tile backend has to bring: the elementwise work on one tile of logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .pointwise import RuleNumbers


class TileKernels(Protocol):
    """Elementwise work on one tile; everything else is in ``tile_loop.TiledBackend``.

    ``z`` and ``w`` are [R, W] tiles of student (or the only model's) and teacher logits, row stride a multiple
    of 16 and greater than W, still to be multiplied by ``scale`` (1/temperature). ``columns`` int64 [R] is the
    sampled token's column, outside [0, W) where another tile holds it. Results are updated in place and may
    be strided along tokens. Unless said otherwise z, w and scratch tiles may be destroyed.
    """

    # Whether both ``stats`` leave z and w as they are, so that later passes can have them from a cache.
    stats_keeps_tiles: bool
    # Scratch tiles like z that each method wants.
    stats_scratch: int
    entropy_scratch: int
    gradient_scratch: int
    pointwise_scratch: int

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or one sentence: what is missing and how to get it. ``dtype`` is the compute dtype."""

    def stats(
        self, z: Tensor, w: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, state: Tensor
    ) -> None:
        """Merge the tile into ``state`` [10, R]."""

    def entropy(self, z: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, rows: Tensor) -> None:
        """Merge the tile into ``rows`` [4, R]."""

    def topk(
        self, z: Tensor, scratch: list[Tensor], first_id: int, scale: float, logits: Tensor, ids: Tensor
    ) -> None:
        """Merge the tile, whose column 0 is token ``first_id``, into the list [R, K]; z stays as it is."""

    def gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        columns: Tensor,
        scale: float,
        scalars: Tensor,
        dz: Tensor,
    ) -> None:
        """The gradient of ``row_scalars.pack_scalars`` ([7, R]) into ``dz`` [R, W], which may be ``z``."""

    def support_gradient(
        self,
        z: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        columns: Tensor,
        values: Tensor,
        dz: Tensor,
    ) -> None:
        """p (a + b ln p) into ``dz`` (may be ``z``), then ``values`` at ``columns``, both [R, G].

        ``scalars`` [3, R]: log-sum-exp, a, b. Columns outside [0, W) are skipped, the others of a row distinct.
        """

    def pointwise_stats(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        lse: Tensor,
        rule: RuleNumbers,
        sums: Tensor,
    ) -> None:
        """Add the tile's part to ``sums`` [4, R], rows ``pointwise.SUMS``; ``lse`` [2, R] of student and teacher."""

    def pointwise_gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        rule: RuleNumbers,
        dz: Tensor,
    ) -> None:
        """c (p g - p M) into ``dz`` (may be ``z``); ``scalars`` [4, R] of ``pack_pointwise_scalars``."""
