"""Checked entry points of the two passes, dispatched by backend name.

Shapes: T tokens, Hs and Ht hidden sizes of student and teacher, Vl vocabulary rows of this rank's shard.
Student and teacher shards cover the same vocabulary ids. Hidden states and weights may be float64, float32,
bfloat16 or float16; everything is computed in float64 if a hidden state is float64 and in float32 otherwise.
"""

from __future__ import annotations

from torch import Tensor

from .backends import Backend, resolve_backend
from .checks import (
    check_coefficients,
    check_columns,
    check_finite,
    check_labels,
    check_model,
    check_pair,
    check_rows,
    check_support,
    check_temperature,
    check_topk,
    check_weight_grad,
)
from .entropy_state import EntropyState
from .gemm import compute_dtype
from .logit_cache import LogitCache
from .pointwise import PointwiseRule
from .state import TokenStats
from .support import SupportGradient
from .tiling import DEFAULT_TILES, TileOptions, VocabShard


def linear_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    cache: LogitCache | None = None,
) -> Tensor:
    """Pass 1: the streaming state of both models over this rank's vocabulary shard.

    Args:
        student_hidden: [T, Hs]. student_weight: [Vl, Hs]. teacher_hidden: [T, Ht]. teacher_weight: [Vl, Ht].
        labels: [T] int64, global ids of the sampled tokens, all in [0, shard.valid).
        temperature: divides the logits of both models.
        cache: takes the tiles of logits that fit it, for pass 2 over the same tokens with the same options.

    Returns:
        [10, T] float32 (float64): rows as in ``state``. Give it to ``merge_tp``, then to ``finalize``.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    inputs = (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    backend = _checked_backend(*inputs, shard, temperature, options)
    return backend.stats(*inputs, shard=shard, temperature=temperature, options=options, cache=cache)


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    topk: int = 0,
    gather_ids: Tensor | None = None,
    options: TileOptions = DEFAULT_TILES,
) -> EntropyState:
    """Pass 1 of one model: log-sum-exp, entropy, the sampled token's logit; optionally single other logits.

    Args:
        hidden: [T, H]. weight: [Vl, H]. labels: [T] int64 in [0, shard.valid).
        topk: K, at most 128; 0 for none. The K largest logits and their ids are streamed: [T, K] is all that
            is kept. Ties go to the smaller id, whatever the tiles, shards and backend.
        gather_ids: int64 [T, G] global ids whose logits are wanted too; an id that this shard does not hold gives 0.

    Returns:
        See :class:`EntropyState`. Give it to ``merge_tp``, then to ``finalize_entropy``.

    Raises:
        ValueError: naming the argument, what it got and what it wanted; also if topk exceeds the vocabulary.
    """
    check_model("", hidden, weight)
    check_labels(labels, hidden, shard, options)
    check_temperature(temperature)
    check_topk(topk, shard)
    if gather_ids is not None:
        check_support("gather_ids", gather_ids, hidden)
    if options.check_finite:
        check_finite(hidden=hidden, weight=weight)
    return resolve_backend(options.backend, labels.device, compute_dtype(hidden)).entropy(
        hidden,
        weight,
        labels,
        gather_ids,
        shard=shard,
        temperature=temperature,
        topk=topk,
        options=options,
    )


def linear_split_kl_grads(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    stats: TokenStats,
    coefficients: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_grad: Tensor | None = None,
    weight_requires_grad: bool = True,
    cache: LogitCache | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pass 2: gradients of sum_t (c_0 FKL_t + c_1 RKL_t + c_2 H_s,t + c_3 ln p_t(y_t)), logits recomputed.

    Args:
        student_hidden ... labels: as in :func:`linear_stats`.
        stats: of the same tokens and temperature, over the whole vocabulary (merged over tensor-parallel
            ranks).
        coefficients: [T, 4] float, columns ``checks.COEFFICIENTS``. Rows of zeros cost as much as others: drop them
            before.
        weight_grad: [Vl, Hs] of any float dtype, added to in place (Megatron's ``main_grad``); None: a new
            one.
        weight_requires_grad: False skips the weight's gradient and its GEMM.
        cache: what pass 1 left there is used up instead of computing it again.

    Returns:
        (dh [T, Hs] float32 (float64), PARTIAL: the sum over tensor-parallel ranks is the gradient;
        dW [Vl, Hs] in the weight's dtype, or None if it was added to ``weight_grad`` or not wanted).

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    inputs = (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    backend = _checked_backend(*inputs, shard, temperature, options)
    tokens = student_hidden.shape[0]
    check_coefficients(coefficients, student_hidden)
    check_columns("stats", stats._asdict(), tokens)
    check_weight_grad(weight_grad, student_weight)
    return backend.gradients(
        *inputs,
        stats,
        coefficients,
        shard=shard,
        temperature=temperature,
        options=options,
        weight_grad=weight_grad,
        weight_requires_grad=weight_requires_grad,
        cache=cache,
    )


def linear_support_grads(
    hidden: Tensor,
    weight: Tensor,
    gradient: SupportGradient,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_grad: Tensor | None = None,
    weight_requires_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Pass 2 of a divergence on few vocabulary entries: one model's logits recomputed, no teacher GEMM.

    Args:
        hidden: [T, H]. weight: [Vl, H]. gradient: of the same tokens, the same on all tensor-parallel ranks.
        weight_grad, weight_requires_grad: as in :func:`linear_split_kl_grads`.

    Returns:
        As :func:`linear_split_kl_grads`.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    check_model("", hidden, weight)
    check_temperature(temperature)
    columns = {"lse": gradient.lse, "offset": gradient.offset, "slope": gradient.slope}
    check_columns("gradient", columns, hidden.shape[0])
    check_support("gradient.ids", gradient.ids, hidden)
    if gradient.values.shape != gradient.ids.shape:
        raise ValueError(
            f"gradient.values has shape {tuple(gradient.values.shape)}, wanted {tuple(gradient.ids.shape)} "
            "like gradient.ids"
        )
    check_weight_grad(weight_grad, weight)
    if options.check_finite:
        check_finite(hidden=hidden, weight=weight)
    return resolve_backend(options.backend, hidden.device, compute_dtype(hidden)).support_gradients(
        hidden,
        weight,
        gradient,
        shard=shard,
        temperature=temperature,
        options=options,
        weight_grad=weight_grad,
        weight_requires_grad=weight_requires_grad,
    )


def linear_pointwise_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    stats: TokenStats,
    rule: PointwiseRule,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    cache: LogitCache | None = None,
) -> Tensor:
    """Between the passes: this shard's part of a pointwise divergence, logits recomputed.

    Args:
        student_hidden ... teacher_weight: as in :func:`linear_stats`.
        stats: of the same tokens and temperature, over the whole vocabulary; the two log-sum-exps are read.
        cache: what pass 1 left there is used, and stays for pass 2.

    Returns:
        [4, T] float32 (float64), rows ``pointwise.SUMS``: sum_v min(f_v, clip), sum_v p_v g_v, sum_v p_v and
        sum_v |p_v - q_v|. They add up over shards: give them to ``sum_tp``.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    pair = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    backend = _checked_backend(*pair, None, shard, temperature, options)
    check_columns("stats", stats._asdict(), student_hidden.shape[0])
    return backend.pointwise_stats(
        *pair, stats, rule, shard=shard, temperature=temperature, options=options, cache=cache
    )


def linear_pointwise_grads(
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
    temperature: float = 1.0,
    options: TileOptions = DEFAULT_TILES,
    weight_grad: Tensor | None = None,
    weight_requires_grad: bool = True,
    cache: LogitCache | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pass 2: gradients of sum_t coefficients_t D_t, logits recomputed.

    Args:
        student_hidden ... stats: as in :func:`linear_pointwise_stats`.
        mean: [T], of its result over the whole vocabulary row 1 over row 2.
        coefficients: [T] float32 (float64). Zeros cost as much as others: drop those rows before.
        weight_grad ... cache: as in :func:`linear_split_kl_grads`.

    Returns:
        As :func:`linear_split_kl_grads`.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    pair = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    backend = _checked_backend(*pair, None, shard, temperature, options)
    check_coefficients(coefficients, student_hidden, None)
    check_columns("stats", stats._asdict(), student_hidden.shape[0])
    check_rows(student_hidden.shape[0], mean=mean)
    check_weight_grad(weight_grad, student_weight)
    return backend.pointwise_gradients(
        *pair,
        stats,
        mean,
        coefficients,
        rule,
        shard=shard,
        temperature=temperature,
        options=options,
        weight_grad=weight_grad,
        weight_requires_grad=weight_requires_grad,
        cache=cache,
    )


def _checked_backend(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    shard: VocabShard,
    temperature: float,
    options: TileOptions,
) -> Backend:
    """The backend to use, once everything that the passes over two models get is known to be right."""
    check_model("student", student_hidden, student_weight)
    check_model("teacher", teacher_hidden, teacher_weight)
    check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if labels is not None:
        check_labels(labels, student_hidden, shard, options)
    check_temperature(temperature)
    if options.check_finite:
        check_finite(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )
    dtype = compute_dtype(student_hidden, teacher_hidden)
    return resolve_backend(options.backend, student_hidden.device, dtype)
