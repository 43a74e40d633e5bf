"""The passes over tiles of logits that the ``torch``, ``cpu`` and ``cuda`` backends share.

A library GEMM writes a tile of logits into scratch and an elementwise kernel (``tile_kernels``) reduces it or turns
it into dz.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .entropy_state import EntropyState, empty_entropy_state
from .gemm import Workspace, compute_dtype, matmul, operand, operand_dtype
from .gradient_loop import DzOfRows, accumulate_gradients
from .logit_cache import LogitCache
from .pointwise import SUMS, PointwiseRule, pack_pointwise_scalars
from .row_scalars import pack_scalars
from .state import TokenStats, empty_state
from .support import SupportGradient
from .tile_kernels import TileKernels
from .tiling import TileOptions, VocabShard, spans

# Two hidden states and weights: of the student, then of the teacher.
_Pair = tuple[Tensor, Tensor, Tensor, Tensor]

# (window, rows, z, w, scratch, dz): dz of a tile from its logits.
_TurnIntoDz = Callable[[slice, slice, Tensor, Tensor, list[Tensor], Tensor], None]


class TiledBackend:
    """The six passes; signatures as in ``api``, arguments already checked."""

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
        pair = (student_hidden, student_weight, teacher_hidden, teacher_weight)
        tiles = self._pair_tiles(pair, valid_rows, dtype, options, cache, self._kernels.stats_scratch)
        for window, rows, z, w, scratch in tiles:
            columns = labels[rows] - (shard.start + window.start)
            self._kernels.stats(z, w, scratch, columns, 1 / temperature, state[:, rows])
        return state

    @torch.no_grad()
    def pointwise_stats(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        stats: TokenStats,
        rule: PointwiseRule,
        *,
        shard: VocabShard,
        temperature: float,
        options: TileOptions,
        cache: LogitCache | None = None,
    ) -> Tensor:
        """Between the passes, see :func:`api.linear_pointwise_stats`."""
        dtype = compute_dtype(student_hidden, teacher_hidden)
        lse = torch.stack([stats.student_lse, stats.teacher_lse]).to(dtype)
        sums = lse.new_zeros(len(SUMS), lse.shape[1])
        pair = (student_hidden, student_weight, teacher_hidden, teacher_weight)
        valid_rows, scratch_tiles = shard.valid_rows(student_weight.shape[0]), self._kernels.pointwise_scratch
        tiles = self._pair_tiles(pair, valid_rows, dtype, options, cache, scratch_tiles)
        for _, rows, z, w, scratch in tiles:
            self._kernels.pointwise_stats(
                z, w, scratch, 1 / temperature, lse[:, rows], rule.numbers(), sums[:, rows]
            )
        return sums

    def _pair_tiles(
        self,
        pair: _Pair,
        valid_rows: int,
        dtype: torch.dtype,
        options: TileOptions,
        cache: LogitCache | None,
        scratch_tiles: int,
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, list[Tensor]]]:
        """(window, rows, z, w, scratch) of every tile: logits from the cache, or computed and kept if they fit it."""
        student_hidden, student_weight, teacher_hidden, teacher_weight = pair
        tokens, device = student_hidden.shape[0], student_hidden.device
        workspace = _workspace(options, tokens, valid_rows, device, [dtype] * (2 + scratch_tiles))
        if not self._kernels.stats_keeps_tiles:
            cache = None
        for window in spans(valid_rows, options.vocab):
            student_window = operand(student_weight[window], dtype)
            teacher_window = operand(teacher_weight[window], dtype)
            for rows in spans(tokens, options.tokens):
                z, w, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                kept = None if cache is None else cache.look(window, rows)
                if kept is not None:
                    z, w = kept
                else:
                    if cache is not None:
                        z, w = cache.reserve(window, rows, dtype, device) or (z, w)
                    matmul(operand(student_hidden[rows], dtype), student_window.t(), z)
                    matmul(operand(teacher_hidden[rows], dtype), teacher_window.t(), w)
                yield window, rows, z, w, scratch

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

        def turn_into_dz(
            window: slice, rows: slice, z: Tensor, w: Tensor, scratch: list[Tensor], dz: Tensor
        ) -> None:
            columns = labels[rows] - (shard.start + window.start)
            self._kernels.gradient(z, w, scratch, columns, 1 / temperature, scalars[:, rows], dz)

        return self._pair_gradients(
            (student_hidden, student_weight, teacher_hidden, teacher_weight),
            turn_into_dz,
            self._kernels.gradient_scratch,
            valid_rows=valid_rows,
            dtype=dtype,
            options=options,
            weight_grad=weight_grad,
            weight_requires_grad=weight_requires_grad,
            cache=cache,
        )

    @torch.no_grad()
    def pointwise_gradients(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        stats: TokenStats,
        mean: Tensor,
        coefficients: Tensor,
        rule: PointwiseRule,
        *,
        shard: VocabShard,
        temperature: float,
        options: TileOptions,
        weight_grad: Tensor | None,
        weight_requires_grad: bool,
        cache: LogitCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pass 2 of a pointwise divergence, see :func:`api.linear_pointwise_grads`."""
        dtype = compute_dtype(student_hidden, teacher_hidden)
        scalars = pack_pointwise_scalars(stats, mean, coefficients, temperature, dtype)

        def turn_into_dz(
            window: slice, rows: slice, z: Tensor, w: Tensor, scratch: list[Tensor], dz: Tensor
        ) -> None:
            self._kernels.pointwise_gradient(
                z, w, scratch, 1 / temperature, scalars[:, rows], rule.numbers(), dz
            )

        return self._pair_gradients(
            (student_hidden, student_weight, teacher_hidden, teacher_weight),
            turn_into_dz,
            self._kernels.pointwise_scratch,
            valid_rows=shard.valid_rows(student_weight.shape[0]),
            dtype=dtype,
            options=options,
            weight_grad=weight_grad,
            weight_requires_grad=weight_requires_grad,
            cache=cache,
        )

    def _pair_gradients(
        self,
        pair: _Pair,
        turn_into_dz: _TurnIntoDz,
        scratch_tiles: int,
        *,
        valid_rows: int,
        dtype: torch.dtype,
        options: TileOptions,
        weight_grad: Tensor | None,
        weight_requires_grad: bool,
        cache: LogitCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pass 2 of two models: logits from the cache or recomputed, then ``turn_into_dz``, then the two GEMMs."""
        student_hidden, student_weight, teacher_hidden, teacher_weight = pair
        own_dz = _own_dz(student_hidden, dtype)
        tiles = [*[dtype] * (2 + scratch_tiles), *own_dz]
        workspace = _workspace(options, len(student_hidden), valid_rows, student_hidden.device, tiles)

        def open_window(window: slice, student_window: Tensor) -> DzOfRows:
            teacher_window = operand(teacher_weight[window], dtype)

            def dz_of(rows: slice, hidden_rows: Tensor) -> Tensor:
                z, w, *scratch = workspace.views(rows.stop - rows.start, window.stop - window.start)
                cached = None if cache is None else cache.take(window, rows)
                if cached is not None:
                    z, w = cached
                else:
                    matmul(hidden_rows, student_window.t(), z)
                    matmul(operand(teacher_hidden[rows], dtype), teacher_window.t(), w)
                dz = scratch.pop() if own_dz else z
                turn_into_dz(window, rows, z, w, scratch, dz)
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
