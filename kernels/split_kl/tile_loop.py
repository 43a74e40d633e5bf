"""The passes over tiles of logits that the ``torch``, ``cpu`` and ``cuda`` backends share.

A library GEMM writes a tile of logits into scratch and an elementwise kernel (:class:`TileKernels`) reduces it
or turns it into dz.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .entropy_state import EntropyState, empty_entropy_state
from .gemm import Workspace, compute_dtype, matmul, operand, operand_dtype
from .gradient_loop import DzOfRows, accumulate_gradients
from .logit_cache import LogitCache
from .row_scalars import pack_scalars
from .state import TokenStats, empty_state
from .support import SupportGradient
from .tiling import TileOptions, VocabShard, spans


class TileKernels(Protocol):
    """Elementwise work on one tile; everything else is in :class:`TiledBackend`.

    ``z`` and ``w`` are [R, W] tiles of student (or the only model's) and teacher logits, row stride a multiple
    of 16 and greater than W, still to be multiplied by ``scale`` (1/temperature). ``columns`` int64 [R] is the
    sampled token's column, outside [0, W) where another tile holds it. Results are updated in place and may
    be strided along tokens. Unless said otherwise z, w and scratch tiles may be destroyed.
    """

    # Whether ``stats`` leaves z and w as they are, so that pass 2 can have them from a cache.
    stats_keeps_tiles: bool
    # Scratch tiles like z that each method wants.
    stats_scratch: int
    entropy_scratch: int
    gradient_scratch: int

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


class TiledBackend:
    """The four passes; signatures as in ``api``, arguments already checked."""

    def __init__(self, kernels: TileKernels) -> None:
        self._kernels = kernels
        self.unavailable = kernels.unavailable

    @torch.no_grad()
    def stats(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        *,
        shard: VocabShard,
        temperature: float,
        options: TileOptions,
        cache: LogitCache | None = None,
    ) -> Tensor:
        """Pass 1, see :func:`api.linear_stats`."""
        dtype = compute_dtype(student_hidden, teacher_hidden)
        tokens, valid_rows = labels.shape[0], shard.valid_rows(student_weight.shape[0])
        state = empty_state(tokens, dtype=dtype, device=labels.device)
        tiles = [dtype] * (2 + self._kernels.stats_scratch)
        workspace = _workspace(options, tokens, valid_rows, labels.device, tiles)
        for window in spans(valid_rows, options.vocab):
            student_window = operand(student_weight[window], dtype)
            teacher_window = operand(teacher_weight[window], dtype)
            columns = labels - (shard.start + window.start)
            for rows in spans(tokens, options.tokens):
                z, w, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                if cache is not None and self._kernels.stats_keeps_tiles:
                    z, w = cache.reserve(window, rows, dtype, labels.device) or (z, w)
                matmul(operand(student_hidden[rows], dtype), student_window.t(), z)
                matmul(operand(teacher_hidden[rows], dtype), teacher_window.t(), w)
                self._kernels.stats(z, w, scratch, columns[rows], 1 / temperature, state[:, rows])
        return state

    @torch.no_grad()
    def entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        gather_ids: Tensor | None,
        *,
        shard: VocabShard,
        temperature: float,
        topk: int,
        options: TileOptions,
    ) -> EntropyState:
        """Pass 1 of one model, see :func:`api.linear_entropy`."""
        dtype = compute_dtype(hidden)
        tokens, valid_rows = labels.shape[0], shard.valid_rows(weight.shape[0])
        gathered = None if gather_ids is None else gather_ids.shape[1]
        state = empty_entropy_state(tokens, topk, gathered, dtype=dtype, device=labels.device)
        tiles = [dtype] * (1 + self._kernels.entropy_scratch)
        workspace = _workspace(options, tokens, valid_rows, labels.device, tiles)
        for window in spans(valid_rows, options.vocab):
            weight_window = operand(weight[window], dtype)
            first_id, scale = shard.start + window.start, 1 / temperature
            for rows in spans(tokens, options.tokens):
                z, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                matmul(operand(hidden[rows], dtype), weight_window.t(), z)
                if state.gathered is not None and gather_ids is not None:
                    state.gathered[rows] += _gather(z, gather_ids[rows] - first_id).mul_(scale)
                if state.topk_logits is not None and state.topk_ids is not None:
                    self._kernels.topk(
                        z, scratch, first_id, scale, state.topk_logits[rows], state.topk_ids[rows]
                    )
                self._kernels.entropy(z, scratch, labels[rows] - first_id, scale, state.rows[:, rows])
        return state

    @torch.no_grad()
    def gradients(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        stats: TokenStats,
        coefficients: Tensor,
        *,
        shard: VocabShard,
        temperature: float,
        options: TileOptions,
        weight_grad: Tensor | None,
        weight_requires_grad: bool,
        cache: LogitCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pass 2, see :func:`api.linear_split_kl_grads`."""
        dtype = compute_dtype(student_hidden, teacher_hidden)
        valid_rows = shard.valid_rows(student_weight.shape[0])
        scalars = pack_scalars(stats, coefficients, temperature, dtype)
        own_dz = _own_dz(student_hidden, dtype)
        tiles = [*[dtype] * (2 + self._kernels.gradient_scratch), *own_dz]
        workspace = _workspace(options, len(labels), valid_rows, labels.device, tiles)

        def open_window(window: slice, student_window: Tensor) -> DzOfRows:
            teacher_window = operand(teacher_weight[window], dtype)
            columns = labels - (shard.start + window.start)

            def dz_of(rows: slice, hidden_rows: Tensor) -> Tensor:
                z, w, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                cached = None if cache is None else cache.take(window, rows)
                if cached is not None:
                    z, w = cached
                else:
                    matmul(hidden_rows, student_window.t(), z)
                    matmul(operand(teacher_hidden[rows], dtype), teacher_window.t(), w)
                dz = scratch.pop() if own_dz else z
                self._kernels.gradient(z, w, scratch, columns[rows], 1 / temperature, scalars[:, rows], dz)
                return dz

            return dz_of

        return accumulate_gradients(
            student_hidden,
            student_weight,
            open_window,
            valid_rows=valid_rows,
            dtype=dtype,
            options=options,
            weight_grad=weight_grad,
            weight_requires_grad=weight_requires_grad,
        )

    @torch.no_grad()
    def support_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        gradient: SupportGradient,
        *,
        shard: VocabShard,
        temperature: float,
        options: TileOptions,
        weight_grad: Tensor | None,
        weight_requires_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Pass 2 of a top-k divergence, see :func:`api.linear_support_grads`."""
        dtype = compute_dtype(hidden)
        valid_rows = shard.valid_rows(weight.shape[0])
        scalars, values = gradient.scaled(1 / temperature, dtype)
        own_dz = _own_dz(hidden, dtype)
        tiles = [*[dtype] * (1 + self._kernels.gradient_scratch), *own_dz]
        workspace = _workspace(options, len(hidden), valid_rows, hidden.device, tiles)

        def open_window(window: slice, weight_window: Tensor) -> DzOfRows:
            columns = (gradient.ids - (shard.start + window.start)).contiguous()

            def dz_of(rows: slice, hidden_rows: Tensor) -> Tensor:
                z, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                matmul(hidden_rows, weight_window.t(), z)
                dz = scratch.pop() if own_dz else z
                self._kernels.support_gradient(
                    z, scratch, 1 / temperature, scalars[:, rows], columns[rows], values[rows], dz
                )
                return dz

            return dz_of

        return accumulate_gradients(
            hidden,
            weight,
            open_window,
            valid_rows=valid_rows,
            dtype=dtype,
            options=options,
            weight_grad=weight_grad,
            weight_requires_grad=weight_requires_grad,
        )


def _workspace(
    options: TileOptions, tokens: int, valid_rows: int, device: torch.device, dtypes: list[torch.dtype]
) -> Workspace:
    return Workspace(min(options.tokens, tokens), min(options.vocab, valid_rows), device, dtypes)


def _own_dz(hidden: Tensor, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype of the scratch tile for dz, where dz is narrower than the logits and cannot replace them."""
    narrow = operand_dtype(hidden, dtype)
    return [] if narrow == dtype else [narrow]


def _gather(z: Tensor, columns: Tensor) -> Tensor:
    """z at ``columns`` [R, G], 0 where a column is outside the tile. Dense: no synchronisation on CUDA."""
    owned = (columns >= 0) & (columns < z.shape[1])
    return torch.where(owned, z.gather(1, columns.clamp(0, z.shape[1] - 1)), 0.0)
