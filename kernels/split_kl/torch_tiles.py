"""The ``torch`` backend: library GEMMs into a bounded tile of logits, in-place elementwise passes over it.

Vocabulary windows are the outer loop and token tiles the inner one: a window of the weight is read (and, from
bf16, cast) once, and its weight gradient is complete when the window is left, so it is written once. The
[T, H] gradient of the hidden states is what is read and written again per window, in the compute dtype.

Logits are never rounded below float32: bf16 logits cost 3-19 % of gradient error when teacher and student are
close. Only on CUDA is the finished dz tile rounded (to the operands' dtype, for the tensor cores), which
costs about 1.6e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import EntropyState, TokenStats, empty_entropy_state, empty_state, merge, merge_entropy
from .tiling import TileOptions, VocabShard, spans


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unavailable(device: torch.device) -> str | None:
    """None: plain torch runs on every device."""
    return None


class _Buffers:
    """``count`` scratch tiles, reused for every tile so that the workspace does not grow with T or V."""

    def __init__(self, count: int, tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = [torch.empty(tokens * vocab, dtype=dtype, device=device) for _ in range(count)]

    def views(self, rows: int, columns: int) -> list[Tensor]:
        """Contiguous [rows, columns] views, also for ragged tails."""
        return [flat[: rows * columns].view(rows, columns) for flat in self._flat]


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as the GEMM takes it: tensor cores read bf16 and accumulate in float32, CPU GEMMs cannot."""
    keep = tensor.is_cuda and dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor if keep else tensor.to(dtype)


def _mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _logits(hidden: Tensor, weight: Tensor, inv_temperature: float, out: Tensor) -> Tensor:
    """hidden [R, H] @ weight [W, H]^T / temperature, written to ``out`` [R, W]."""
    _mm(_operand(hidden, out.dtype), weight.t(), out)
    return out if inv_temperature == 1.0 else out.mul_(inv_temperature)


def _owned_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(column of each label clamped into the window [R, 1], whether the window holds it [R]).

    Dense on purpose: selecting the owned rows would synchronise a CUDA stream for every tile.
    """
    columns = labels - start
    return columns.clamp(0, width - 1)[:, None], (columns >= 0) & (columns < width)


def _sampled_logit(logits: Tensor, columns: Tensor, owned: Tensor) -> Tensor:
    picked = logits.gather(1, columns)[:, 0]
    return torch.where(owned, picked, torch.zeros_like(picked))


def _tile_state(buffers: list[Tensor], columns: Tensor, owned: Tensor) -> Tensor:
    """State [10, R] of one tile; buffers are (z, w, scratch, scratch), all destroyed."""
    z, w, exp, delta = buffers
    z_y, w_y = _sampled_logit(z, columns, owned), _sampled_logit(w, columns, owned)
    m_s, m_t = z.amax(1), w.amax(1)
    z.sub_(m_s[:, None])
    w.sub_(m_t[:, None])
    torch.sub(z, w, out=delta)
    torch.exp(z, out=exp)
    s_s, u_s, x_s = exp.sum(1), z.mul_(exp).sum(1), exp.mul_(delta).sum(1)
    torch.exp(w, out=exp)
    s_t, u_t, x_t = exp.sum(1), w.mul_(exp).sum(1), exp.mul_(delta).sum(1)
    return torch.stack([m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z_y, w_y])


@torch.no_grad()
def stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float,
    options: TileOptions,
) -> Tensor:
    """Pass 1, see :func:`api.linear_stats`."""
    dtype = compute_dtype(student_hidden, teacher_hidden)
    tokens, valid_rows = labels.shape[0], shard.valid_rows(student_weight.shape[0])
    state = empty_state(tokens, dtype=dtype, device=labels.device)
    tile_tokens, tile_vocab = min(options.tokens, tokens), min(options.vocab, valid_rows)
    buffers = _Buffers(4, tile_tokens, tile_vocab, dtype, labels.device)
    for window in spans(valid_rows, options.vocab):
        student_window = _operand(student_weight[window], dtype)
        teacher_window = _operand(teacher_weight[window], dtype)
        width = window.stop - window.start
        for rows in spans(tokens, options.tokens):
            tiles = buffers.views(rows.stop - rows.start, width)
            _logits(student_hidden[rows], student_window, 1 / temperature, tiles[0])
            _logits(teacher_hidden[rows], teacher_window, 1 / temperature, tiles[1])
            columns, owned = _owned_columns(labels[rows], shard.start + window.start, width)
            state[:, rows] = merge(state[:, rows], _tile_state(tiles, columns, owned))
    return state


@torch.no_grad()
def entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float,
    topk: int,
    options: TileOptions,
) -> EntropyState:
    """Pass 1 of one model, see :func:`api.linear_entropy`."""
    dtype = compute_dtype(hidden)
    tokens, valid_rows = labels.shape[0], shard.valid_rows(weight.shape[0])
    state = empty_entropy_state(tokens, topk, dtype=dtype, device=labels.device)
    tile_tokens, tile_vocab = min(options.tokens, tokens), min(options.vocab, valid_rows)
    buffers = _Buffers(2, tile_tokens, tile_vocab, dtype, labels.device)
    for window in spans(valid_rows, options.vocab):
        weight_window = _operand(weight[window], dtype)
        width = window.stop - window.start
        for rows in spans(tokens, options.tokens):
            z, exp = buffers.views(rows.stop - rows.start, width)
            _logits(hidden[rows], weight_window, 1 / temperature, z)
            columns, owned = _owned_columns(labels[rows], shard.start + window.start, width)
            z_y = _sampled_logit(z, columns, owned)
            largest = z.topk(min(topk, width), dim=1).values if topk else None
            m = z.amax(1)
            torch.exp(z.sub_(m[:, None]), out=exp)
            tile = EntropyState(torch.stack([m, exp.sum(1), z.mul_(exp).sum(1), z_y]), largest)
            running = EntropyState(
                state.rows[:, rows], None if state.topk_logits is None else state.topk_logits[rows]
            )
            merged = merge_entropy(running, tile)
            state.rows[:, rows] = merged.rows
            if state.topk_logits is not None and merged.topk_logits is not None:
                state.topk_logits[rows] = merged.topk_logits
    return state


class _RowScalars:
    """What the logit gradient needs of each token, each [T, 1], already divided by the temperature."""

    def __init__(
        self, stats: TokenStats, coefficients: Tensor, temperature: float, dtype: torch.dtype
    ) -> None:
        forward, reverse, entropy, logprob = (coefficients.to(dtype) / temperature).unbind(1)
        self.student_lse, self.teacher_lse = stats.student_lse[:, None], stats.teacher_lse[:, None]
        self.forward, self.reverse_minus_entropy = forward[:, None], (reverse - entropy)[:, None]
        self.entropy, self.logprob = entropy[:, None], logprob[:, None]
        offset = forward - logprob - reverse * stats.reverse_kl - entropy * stats.student_entropy
        self.offset = offset[:, None]
        # One synchronisation per call; without an entropy term every tile saves a pass.
        self.has_entropy = bool(entropy.any())

    def logit_gradient(self, tiles: list[Tensor], rows: slice, columns: Tensor, owned: Tensor) -> Tensor:
        """dL/dz [R, W], in the first of the tiles (z, w, scratch); all are destroyed.

        p (offset + (c_r - c_e)(ln p - ln q) - c_e ln q) - c_f q + c_y 1{v = y}, the sum of the four terms
        c_f (p - q), c_r p (ln p - ln q - RKL), -c_e p (ln p + H_s) and c_y (1{v = y} - p). The two logarithms
        are subtracted before anything multiplies them: close models would lose digits otherwise.
        """
        z, w, p = tiles
        w.sub_(self.teacher_lse[rows])
        torch.exp(z.sub_(self.student_lse[rows]), out=p)
        z.sub_(w)
        torch.addcmul(self.offset[rows], z, self.reverse_minus_entropy[rows], out=z)
        if self.has_entropy:
            z.addcmul_(w, self.entropy[rows], value=-1)
        z.mul_(p).addcmul_(w.exp_(), self.forward[rows], value=-1)
        # One column per row: the scatter has no collisions, hence one possible result.
        return z.scatter_add_(1, columns, torch.where(owned[:, None], self.logprob[rows], 0.0))


@torch.no_grad()
def gradients(
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
) -> tuple[Tensor, Tensor | None]:
    """Pass 2, see :func:`api.linear_split_kl_grads`."""
    dtype = compute_dtype(student_hidden, teacher_hidden)
    tokens, valid_rows = labels.shape[0], shard.valid_rows(student_weight.shape[0])
    hidden_grad = torch.zeros(student_hidden.shape, dtype=dtype, device=labels.device)
    fresh = torch.zeros_like(student_weight) if weight_requires_grad and weight_grad is None else None
    target = weight_grad if weight_requires_grad and weight_grad is not None else fresh
    scalars = _RowScalars(stats, coefficients, temperature, dtype)
    tile_tokens, tile_vocab = min(options.tokens, tokens), min(options.vocab, valid_rows)
    buffers = _Buffers(3, tile_tokens, tile_vocab, dtype, labels.device)
    for window in spans(valid_rows, options.vocab):
        student_window = _operand(student_weight[window], dtype)
        teacher_window = _operand(teacher_weight[window], dtype)
        width = window.stop - window.start
        window_grad = _window_total(target, window, dtype)
        for rows in spans(tokens, options.tokens):
            tiles = buffers.views(rows.stop - rows.start, width)
            hidden_rows = _operand(student_hidden[rows], dtype)
            _logits(hidden_rows, student_window, 1 / temperature, tiles[0])
            _logits(teacher_hidden[rows], teacher_window, 1 / temperature, tiles[1])
            columns, owned = _owned_columns(labels[rows], shard.start + window.start, width)
            dz = scalars.logit_gradient(tiles, rows, columns, owned).to(student_window.dtype)
            _accumulate(hidden_grad[rows], dz, student_window)
            if window_grad is not None:
                _accumulate(window_grad, dz.t(), hidden_rows)
        if target is not None and window_grad is not None and window_grad.dtype != target.dtype:
            target[window] += window_grad
    return hidden_grad, fresh


def _window_total(target: Tensor | None, window: slice, dtype: torch.dtype) -> Tensor | None:
    """Where a window's weight gradient is summed over the token tiles.

    The target itself, or a buffer in the compute dtype if the target is narrower: a bf16 target is then
    rounded once per call and not once per token tile.
    """
    if target is None or target.dtype == dtype:
        return None if target is None else target[window]
    return torch.zeros(target[window].shape, dtype=dtype, device=target.device)
