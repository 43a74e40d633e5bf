"""The ``triton`` backend: both GEMMs and everything after them in one kernel per pass, no logits in memory.

Importable without Triton, which is loaded by the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..entropy_state import EntropyState, empty_entropy_state
from ..gemm import Workspace, compute_dtype, operand
from ..gradient_loop import DzOfRows, accumulate_gradients
from ..logit_cache import LogitCache
from ..pointwise import SUMS, PointwiseRule, pack_pointwise_scalars
from ..row_scalars import pack_scalars
from ..state import TokenStats, empty_state
from ..support import SupportGradient
from ..tiling import TileOptions, VocabShard
from ..topk import decode_keys
from .tile_sizes import ARCHITECTURES, FLOAT32_TILES, INTERPRETER_TILE, TENSOR_CORE_TILES, Tile

# Two hidden states and weights: of the student, then of the teacher.
_Pair = tuple[Tensor, Tensor, Tensor, Tensor]


class TritonBackend:
    """The six passes; signatures and results as ``tile_loop.TiledBackend``, float32 only.

    Pass 1 has no tile of logits in memory, so ``options.tokens`` and ``options.vocab`` only shape pass 2, whose
    single scratch is a tile of dz in the inputs' dtype, float32 or bf16. For the same reason a ``cache`` of logits
    is left empty. Sums run in a fixed order: two calls give the same bits.

    Args:
        tile: for every kernel instead of the table in ``tile_sizes``; for tests.
    """

    def __init__(self, tile: Tile | None = None) -> None:
        self._override = tile

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype != torch.float32:
            return f"it computes in float32 only, not in {dtype}; use backend 'torch'"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not (interpreted and device.type == "cpu"):
            return (
                f"it runs on CUDA devices, not on {device.type}; move the tensors or choose another backend "
                "(tests set TRITON_INTERPRET=1 to interpret the kernels on the CPU)"
            )
        try:
            import triton
        except ImportError as error:
            return f"Triton cannot be imported ({error}); pip install triton"
        if interpreted:
            # Triton reads the variable once, when its own functions are defined.
            late = isinstance(triton.language.sum, triton.JITFunction)
            return "TRITON_INTERPRET was set after Triton had been imported" if late else None
        if not torch.cuda.is_available():
            return "no GPU is visible to torch; check the driver, or choose another backend"
        if torch.version.cuda is None:
            return "it needs an NVIDIA GPU (TMA); use backend 'torch'"
        major, minor = torch.cuda.get_device_capability(device)
        if major < min(ARCHITECTURES):
            return (
                f"it needs a Hopper GPU or newer (TMA), the device is sm_{major}{minor}; use backend 'torch'"
            )
        if major not in ARCHITECTURES:
            return f"its tiles are made for {list(ARCHITECTURES.values())}, the device is sm_{major}{minor}"
        return None

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
        from . import launch

        launch.check_operands(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )
        state = empty_state(labels.shape[0], dtype=torch.float32, device=labels.device)
        valid_rows = shard.valid_rows(student_weight.shape[0])
        if not (valid_rows and labels.shape[0]):
            return state
        student, teacher = student_weight[:valid_rows], teacher_weight[:valid_rows]
        scale, tile = 1 / temperature, self._tile("stats", student_hidden, teacher_hidden)
        with torch.cuda.device_of(labels):
            state = launch.stats(student_hidden, student, teacher_hidden, teacher, scale, tile)
            sampled = labels[:, None]
            state[8] = launch.gather(student_hidden, student, sampled, shard.start, scale)[:, 0]
            state[9] = launch.gather(teacher_hidden, teacher, sampled, shard.start, scale)[:, 0]
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
        """Pass 1 of one model, see :func:`api.linear_entropy`. The top-k costs no second GEMM."""
        from . import launch

        launch.check_operands(hidden=hidden, weight=weight)
        tokens, valid_rows = labels.shape[0], shard.valid_rows(weight.shape[0])
        count = None if gather_ids is None else gather_ids.shape[1]
        state = empty_entropy_state(tokens, topk, count, dtype=torch.float32, device=labels.device)
        if not (valid_rows and tokens):
            return state
        weight, scale, first_id = weight[:valid_rows], 1 / temperature, shard.start
        logits, ids, gathered = state.topk_logits, state.topk_ids, state.gathered
        with torch.cuda.device_of(labels):
            if topk:
                tile = self._tile("topk", hidden)
                rows, keys = launch.topk(hidden, weight, first_id, topk, scale, tile)
                logits, ids = decode_keys(keys)
            else:
                rows = launch.entropy(hidden, weight, scale, self._tile("entropy", hidden))
            rows[3] = launch.gather(hidden, weight, labels[:, None], first_id, scale)[:, 0]
            if gather_ids is not None:
                gathered = launch.gather(hidden, weight, gather_ids, first_id, scale)
        return EntropyState(rows, logits, ids, gathered)

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
        from . import launch

        launch.check_operands(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )
        dtype = compute_dtype(student_hidden, teacher_hidden)
        scalars = pack_scalars(stats, coefficients, temperature, dtype)
        tile = self._tile("dz", student_hidden, teacher_hidden)

        def write_dz(window: slice, rows: slice, operands: _Pair, dz: Tensor) -> None:
            columns = (labels[rows] - (shard.start + window.start)).to(torch.int32)
            launch.dz(*operands, columns, scalars[:, rows], dz, 1 / temperature, tile)

        return _pair_gradients(
            (student_hidden, student_weight, teacher_hidden, teacher_weight),
            write_dz,
            shard=shard,
            options=options,
            weight_grad=weight_grad,
            weight_requires_grad=weight_requires_grad,
        )

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
        from . import launch

        launch.check_operands(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )
        lse = torch.stack([stats.student_lse, stats.teacher_lse]).float()
        valid_rows = shard.valid_rows(student_weight.shape[0])
        if not (valid_rows and lse.shape[1]):
            return lse.new_zeros(len(SUMS), lse.shape[1])
        tile = self._tile("pointwise_stats", student_hidden, teacher_hidden)
        operands = student_hidden, student_weight[:valid_rows], teacher_hidden, teacher_weight[:valid_rows]
        with torch.cuda.device_of(lse):
            return launch.pointwise_stats(*operands, lse, rule.numbers(), 1 / temperature, tile)

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
        from . import launch

        launch.check_operands(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )
        dtype = compute_dtype(student_hidden, teacher_hidden)
        scalars = pack_pointwise_scalars(stats, mean, coefficients, temperature, dtype)
        tile, numbers = self._tile("pointwise_dz", student_hidden, teacher_hidden), rule.numbers()

        def write_dz(window: slice, rows: slice, operands: _Pair, dz: Tensor) -> None:
            launch.pointwise_dz(*operands, scalars[:, rows], numbers, dz, 1 / temperature, tile)

        return _pair_gradients(
            (student_hidden, student_weight, teacher_hidden, teacher_weight),
            write_dz,
            shard=shard,
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
        from . import launch

        launch.check_operands(hidden=hidden, weight=weight)
        dtype = compute_dtype(hidden)
        valid_rows = shard.valid_rows(weight.shape[0])
        scalars, values = gradient.scaled(1 / temperature, dtype)
        ids = gradient.ids.contiguous()
        workspace = _dz_workspace(hidden, valid_rows, options)
        tile = self._tile("support_dz", hidden)

        def open_window(window: slice, _: Tensor) -> DzOfRows:
            weight_window, first_id = weight[window], shard.start + window.start

            def dz_of(rows: slice, _: Tensor) -> Tensor:
                (dz,) = workspace.views(rows.stop - rows.start, window.stop - window.start)
                launch.support_dz(
                    hidden[rows],
                    weight_window,
                    scalars[:, rows],
                    ids[rows],
                    values[rows],
                    first_id,
                    dz,
                    1 / temperature,
                    tile,
                )
                return operand(dz, dtype)

            return dz_of

        with torch.cuda.device_of(hidden):
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

    def _tile(self, kernel: str, *hidden: Tensor) -> Tile:
        if self._override is not None:
            return self._override
        if not hidden[0].is_cuda:
            return INTERPRETER_TILE
        if any(states.dtype == torch.float32 for states in hidden):
            return FLOAT32_TILES[kernel]
        major, _ = torch.cuda.get_device_capability(hidden[0].device)
        return TENSOR_CORE_TILES[kernel, ARCHITECTURES[major]]


def _pair_gradients(
    pair: _Pair,
    write_dz: Callable[[slice, slice, _Pair, Tensor], None],
    *,
    shard: VocabShard,
    options: TileOptions,
    weight_grad: Tensor | None,
    weight_requires_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pass 2 of two models; ``write_dz`` gets (window, rows, the operands of both, a tile of dz to fill)."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = pair
    dtype = compute_dtype(student_hidden, teacher_hidden)
    valid_rows = shard.valid_rows(student_weight.shape[0])
    workspace = _dz_workspace(student_hidden, valid_rows, options)

    def open_window(window: slice, _: Tensor) -> DzOfRows:
        # From the weight itself, not from its operand: only the kernels take bf16 on a CPU too.
        student_window, teacher_window = student_weight[window], teacher_weight[window]

        def dz_of(rows: slice, _: Tensor) -> Tensor:
            (dz,) = workspace.views(rows.stop - rows.start, window.stop - window.start)
            operands = student_hidden[rows], student_window, teacher_hidden[rows], teacher_window
            write_dz(window, rows, operands, dz)
            return operand(dz, dtype)

        return dz_of

    with torch.cuda.device_of(student_hidden):
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


def _dz_workspace(hidden: Tensor, valid_rows: int, options: TileOptions) -> Workspace:
    tokens, vocab = min(options.tokens, hidden.shape[0]), min(options.vocab, valid_rows)
    return Workspace(tokens, vocab, hidden.device, [hidden.dtype])
