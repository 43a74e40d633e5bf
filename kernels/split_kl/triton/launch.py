"""Launches the kernels: descriptors, grids and output buffers. Imports Triton."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from ..entropy_state import ENTROPY_ROWS, merge_rows
from ..pointwise import SUMS, RuleNumbers
from ..state import SENTINEL, STATE_ROWS, merge
from ..topk import NO_ID, encode_keys
from .dz import dz_kernel, support_dz_kernel
from .entropy import entropy_kernel, topk_kernel
from .pointwise import pointwise_dz_kernel, pointwise_stats_kernel
from .selected import gather_kernel, scatter_kernel
from .stats import stats_kernel
from .tile_sizes import GATHER_BLOCKS, SCATTER_BLOCKS, SELECTED_OPTIONS, Tile, tile_blocks, topk_slots

# The key of a slot that holds no token.
EMPTY_KEY = int(encode_keys(torch.tensor(SENTINEL), torch.tensor(NO_ID)))

_MAX_SPLITS = 128
# Pretended in the interpreter: few, so that small tests have several splits and several tiles in each.
_INTERPRETER_PROCESSORS = 3


def stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    scale: float,
    tile: Tile,
) -> Tensor:
    """The state [10, T], rows 8 and 9 zero; weights without padding."""
    tokens, valid_rows = student_hidden.shape[0], student_weight.shape[0]
    split_rows, grid = _splits(student_hidden, valid_rows, tile)
    states = student_hidden.new_zeros(STATE_ROWS, grid[0], tokens, dtype=torch.float32)
    stats_kernel[grid](
        _descriptor(student_hidden, tile.tokens, tile.hidden),
        _descriptor(student_weight, tile.vocab, tile.hidden),
        _descriptor(teacher_hidden, tile.tokens, tile.hidden),
        _descriptor(teacher_weight, tile.vocab, tile.hidden),
        states,
        tokens,
        valid_rows,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        split_rows,
        scale,
        **tile_blocks("stats", tile),
        **tile.options(),
    )
    return _merge_splits(states, merge)


def entropy(hidden: Tensor, weight: Tensor, scale: float, tile: Tile) -> Tensor:
    """Rows [4, T] of an ``EntropyState``, row 3 zero; weight without padding."""
    tokens, valid_rows = hidden.shape[0], weight.shape[0]
    split_rows, grid = _splits(hidden, valid_rows, tile)
    states = hidden.new_zeros(ENTROPY_ROWS, grid[0], tokens, dtype=torch.float32)
    entropy_kernel[grid](
        _descriptor(hidden, tile.tokens, tile.hidden),
        _descriptor(weight, tile.vocab, tile.hidden),
        states,
        tokens,
        valid_rows,
        hidden.shape[1],
        split_rows,
        scale,
        **tile_blocks("entropy", tile),
        **tile.options(),
    )
    return _merge_splits(states, merge_rows)


def topk(
    hidden: Tensor, weight: Tensor, first_id: int, topk: int, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """As :func:`entropy`, and the ``topk`` largest keys int64 [T, K] of the whole shard, descending."""
    tokens, valid_rows, slots = hidden.shape[0], weight.shape[0], topk_slots(topk)
    split_rows, grid = _splits(hidden, valid_rows, tile)
    states = hidden.new_zeros(ENTROPY_ROWS, grid[0], tokens, dtype=torch.float32)
    keys = torch.empty(grid[0], tokens, slots, dtype=torch.int64, device=hidden.device)
    topk_kernel[grid](
        _descriptor(hidden, tile.tokens, tile.hidden),
        _descriptor(weight, tile.vocab, tile.hidden),
        states,
        keys,
        tokens,
        valid_rows,
        hidden.shape[1],
        split_rows,
        first_id,
        scale,
        **tile_blocks("topk", tile),
        K=slots,
        EMPTY=EMPTY_KEY,
        **tile.options(),
    )
    best = keys.transpose(0, 1).reshape(tokens, -1).topk(topk, dim=1).values
    return _merge_splits(states, merge_rows), best


def gather(hidden: Tensor, weight: Tensor, ids: Tensor, first_id: int, scale: float) -> Tensor:
    """Logits [T, G] of global ``ids`` int64 [T, G], 0 for those that ``weight`` (without padding) does not hold."""
    tokens, count = ids.shape
    logits = torch.empty(tokens, count, dtype=torch.float32, device=hidden.device)
    if logits.numel():
        gather_kernel[tokens, cdiv(count, GATHER_BLOCKS["BG"])](
            hidden,
            weight,
            ids.contiguous(),
            logits,
            count,
            first_id,
            weight.shape[0],
            hidden.shape[1],
            scale,
            **GATHER_BLOCKS,
            **SELECTED_OPTIONS,
        )
    return logits


def dz(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    columns: Tensor,
    scalars: Tensor,
    dz: Tensor,
    scale: float,
    tile: Tile,
) -> None:
    """dz [R, W] of R tokens and a window of W rows of the weights; see ``dz_kernel``."""
    tokens, window = dz.shape
    dz_kernel[(cdiv(tokens, tile.tokens) * cdiv(window, tile.vocab),)](
        _descriptor(student_hidden, tile.tokens, tile.hidden),
        _descriptor(student_weight, tile.vocab, tile.hidden),
        _descriptor(teacher_hidden, tile.tokens, tile.hidden),
        _descriptor(teacher_weight, tile.vocab, tile.hidden),
        columns,
        scalars,
        _descriptor(dz, tile.tokens, tile.vocab // 2),
        tokens,
        window,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        scalars.stride(0),
        scale,
        **tile_blocks("dz", tile),
        **tile.options(),
    )


def support_dz(
    hidden: Tensor,
    weight: Tensor,
    scalars: Tensor,
    ids: Tensor,
    values: Tensor,
    first_id: int,
    dz: Tensor,
    scale: float,
    tile: Tile,
) -> None:
    """dz [R, W] = p (a + b ln p), then ``values`` [R, G] at columns ``ids`` - ``first_id`` of the window."""
    tokens, window = dz.shape
    support_dz_kernel[(cdiv(tokens, tile.tokens) * cdiv(window, tile.vocab),)](
        _descriptor(hidden, tile.tokens, tile.hidden),
        _descriptor(weight, tile.vocab, tile.hidden),
        scalars,
        _descriptor(dz, tile.tokens, tile.vocab // 2),
        tokens,
        window,
        hidden.shape[1],
        scalars.stride(0),
        scale,
        **tile_blocks("support_dz", tile),
        **tile.options(),
    )
    count = ids.shape[1]
    if count:
        scatter_kernel[tokens, cdiv(count, SCATTER_BLOCKS["BG"])](
            ids, values, dz, count, first_id, window, dz.stride(0), **SCATTER_BLOCKS, **SELECTED_OPTIONS
        )


def pointwise_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    lse: Tensor,
    rule: RuleNumbers,
    scale: float,
    tile: Tile,
) -> Tensor:
    """[4, T], rows ``pointwise.SUMS``; ``lse`` [2, T] of student and teacher; weights without padding."""
    tokens, valid_rows = student_hidden.shape[0], student_weight.shape[0]
    split_rows, grid = _splits(student_hidden, valid_rows, tile)
    states = lse.new_empty(len(SUMS), grid[0], tokens)
    pointwise_stats_kernel[grid](
        _descriptor(student_hidden, tile.tokens, tile.hidden),
        _descriptor(student_weight, tile.vocab, tile.hidden),
        _descriptor(teacher_hidden, tile.tokens, tile.hidden),
        _descriptor(teacher_weight, tile.vocab, tile.hidden),
        lse,
        states,
        tokens,
        valid_rows,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        split_rows,
        lse.stride(0),
        scale,
        *rule,
        **tile_blocks("pointwise_stats", tile),
        **tile.options(),
    )
    return _merge_splits(states, torch.add)


def pointwise_dz(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    scalars: Tensor,
    rule: RuleNumbers,
    dz: Tensor,
    scale: float,
    tile: Tile,
) -> None:
    """As :func:`dz`; see ``pointwise_dz_kernel``."""
    tokens, window = dz.shape
    pointwise_dz_kernel[(cdiv(tokens, tile.tokens) * cdiv(window, tile.vocab),)](
        _descriptor(student_hidden, tile.tokens, tile.hidden),
        _descriptor(student_weight, tile.vocab, tile.hidden),
        _descriptor(teacher_hidden, tile.tokens, tile.hidden),
        _descriptor(teacher_weight, tile.vocab, tile.hidden),
        scalars,
        _descriptor(dz, tile.tokens, tile.vocab // 2),
        tokens,
        window,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        scalars.stride(0),
        scale,
        *rule,
        **tile_blocks("pointwise_dz", tile),
        **tile.options(),
    )


def check_operands(**tensors: Tensor) -> None:
    """ValueError for a matrix that the kernels are not compiled for or that TMA cannot read."""
    first, dtype = next((name, tensor.dtype) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, torch.float32) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, wanted bfloat16 or float32, the same as {first} ({dtype}): "
                "use backend 'cuda' or 'torch'"
            )
        row_bytes = tensor.shape[1] * tensor.element_size()
        if row_bytes % 16 or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} has rows of {row_bytes} bytes from address "
                f"{tensor.data_ptr():#x}, wanted multiples of 16 (TMA reads nothing else): "
                "use backend 'cuda' or 'torch'"
            )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _splits(hidden: Tensor, valid_rows: int, tile: Tile) -> tuple[int, tuple[int, int]]:
    """(vocabulary rows per split, grid (splits, token tiles)) of a pass-1 kernel."""
    processors = _INTERPRETER_PROCESSORS
    if hidden.is_cuda:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    token_tiles, vocab_tiles = cdiv(hidden.shape[0], tile.tokens), cdiv(valid_rows, tile.vocab)
    per_split = tiles_per_split(token_tiles, vocab_tiles, processors)
    return per_split * tile.vocab, (cdiv(vocab_tiles, per_split), token_tiles)


def _merge_splits(states: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[rows, splits, T] to [rows, T] by pairs: few launches, and an order that depends on the shapes alone."""
    while (splits := states.shape[1]) > 1:
        half = splits // 2
        merged = combine(states[:, :half], states[:, half : 2 * half])
        states = torch.cat([merged, states[:, 2 * half :]], dim=1)
    return states[:, 0]


def tiles_per_split(token_tiles: int, vocab_tiles: int, processors: int) -> int:
    """Vocabulary tiles of each split, such that no processor waits long for the last one.

    Among numbers of splits within 5 % of the fewest steps, the one nearest to the square root of the processors:
    programs that run together then form a square of tiles and share the most operands.
    """

    def steps(splits: int) -> int:
        per_split = cdiv(vocab_tiles, splits)
        rounds = cdiv(token_tiles * cdiv(vocab_tiles, per_split), processors)
        return rounds * per_split

    candidates = range(1, min(_MAX_SPLITS, vocab_tiles) + 1)
    enough = 1.05 * min(map(steps, candidates))
    good = [splits for splits in candidates if steps(splits) <= enough]
    return cdiv(vocab_tiles, min(good, key=lambda splits: abs(splits - math.isqrt(processors))))
