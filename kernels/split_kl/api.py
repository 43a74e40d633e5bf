"""Checked entry points of the two passes, dispatched by backend name.

Shapes: T tokens, Hs and Ht hidden sizes of student and teacher, Vl vocabulary rows of this rank's shard.
Student and teacher shards cover the same vocabulary ids. Hidden states and weights may be float64, float32,
bfloat16 or float16; everything is computed in float64 if a hidden state is float64 and in float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import torch_tiles
from .state import EntropyState, TokenStats
from .tiling import DEFAULT_TILES, TileOptions, VocabShard

# Columns of every ``coefficients`` tensor.
COEFFICIENTS = ("forward_kl", "reverse_kl", "entropy", "logprob")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of the passes; the signatures are those of ``torch_tiles``.

    ``unavailable(device)`` is None where it can run, else one sentence: why not and what to install.
    """

    stats: Callable[..., Tensor]
    entropy: Callable[..., EntropyState]
    gradients: Callable[..., tuple[Tensor, Tensor | None]]
    unavailable: Callable[[torch.device], str | None]


# In the order in which "auto" prefers them.
BACKENDS: dict[str, Backend] = {
    "torch": Backend(torch_tiles.stats, torch_tiles.entropy, torch_tiles.gradients, torch_tiles.unavailable),
}


def resolve_backend(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, "auto" the first available one; ValueError if unknown or unavailable."""
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.unavailable(device) is None)
    if name not in BACKENDS:
        raise ValueError(f"options.backend is {name!r}, wanted one of {['auto', *BACKENDS]}")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        usable = [other for other, backend in BACKENDS.items() if backend.unavailable(device) is None]
        raise ValueError(
            f"options.backend {name!r} is unavailable on {device}: {reason}; usable here: {usable}"
        )
    return BACKENDS[name]


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
) -> Tensor:
    """Pass 1: the streaming state of both models over this rank's vocabulary shard.

    Args:
        student_hidden: [T, Hs]. student_weight: [Vl, Hs]. teacher_hidden: [T, Ht]. teacher_weight: [Vl, Ht].
        labels: [T] int64, global ids of the sampled tokens, all in [0, shard.valid).
        temperature: divides the logits of both models.

    Returns:
        [10, T] float32 (float64): rows as in ``state``. Give it to ``merge_tp``, then to ``finalize``.

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    _check_model("student", student_hidden, student_weight)
    _check_model("teacher", teacher_hidden, teacher_weight)
    _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    _check_labels(labels, student_hidden, shard)
    _check_temperature(temperature)
    return resolve_backend(options.backend, labels.device).stats(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        shard=shard,
        temperature=temperature,
        options=options,
    )


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    topk: int = 0,
    options: TileOptions = DEFAULT_TILES,
) -> EntropyState:
    """Pass 1 of one model: log-sum-exp, entropy, the sampled token's logit, optionally the K largest logits.

    Args:
        hidden: [T, H]. weight: [Vl, H]. labels: [T] int64 in [0, shard.valid).
        topk: K; 0 for none. Logits are streamed: [T, K] is all that is kept. Only values are kept, so that
            ties have no order that could differ between layouts.

    Returns:
        Rows [4, T] and logits [T, K]; a shard with fewer than K rows fills up with the sentinel -1e30.

    Raises:
        ValueError: naming the argument, what it got and what it wanted; also if topk exceeds the vocabulary.
    """
    _check_model("", hidden, weight)
    _check_labels(labels, hidden, shard)
    _check_temperature(temperature)
    if not 0 <= topk <= shard.valid:
        raise ValueError(f"topk is {topk}, wanted 0 <= topk <= {shard.valid}, the vocabulary (shard.valid)")
    return resolve_backend(options.backend, labels.device).entropy(
        hidden, weight, labels, shard=shard, temperature=temperature, topk=topk, options=options
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
) -> tuple[Tensor, Tensor | None]:
    """Pass 2: gradients of sum_t (c_0 FKL_t + c_1 RKL_t + c_2 H_s,t + c_3 ln p_t(y_t)), logits recomputed.

    Args:
        student_hidden ... labels: as in :func:`linear_stats`.
        stats: of the same tokens and temperature, over the whole vocabulary (merged over tensor-parallel
            ranks).
        coefficients: [T, 4] float, columns ``COEFFICIENTS``. Rows of zeros cost as much as others: drop them
            before.
        weight_grad: [Vl, Hs] of any float dtype, added to in place (Megatron's ``main_grad``); None: a new
            one.
        weight_requires_grad: False skips the weight's gradient and its GEMM.

    Returns:
        (dh [T, Hs] float32 (float64), PARTIAL: the sum over tensor-parallel ranks is the gradient;
        dW [Vl, Hs] in the weight's dtype, or None if it was added to ``weight_grad`` or not wanted).

    Raises:
        ValueError: naming the argument, what it got and what it wanted.
    """
    _check_model("student", student_hidden, student_weight)
    _check_model("teacher", teacher_hidden, teacher_weight)
    _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    _check_labels(labels, student_hidden, shard)
    _check_temperature(temperature)
    tokens = student_hidden.shape[0]
    check_coefficients(coefficients, tokens)
    for name, value in stats._asdict().items():
        if value.shape != (tokens,):
            raise ValueError(f"stats.{name} is {_describe(value)}, wanted shape ({tokens},)")
    if weight_grad is not None and weight_grad.shape != student_weight.shape:
        raise ValueError(
            f"weight_grad is {_describe(weight_grad)}, wanted shape {tuple(student_weight.shape)}"
        )
    return resolve_backend(options.backend, labels.device).gradients(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        stats,
        coefficients,
        shard=shard,
        temperature=temperature,
        options=options,
        weight_grad=weight_grad,
        weight_requires_grad=weight_requires_grad,
    )


def check_coefficients(coefficients: Tensor, tokens: int) -> None:
    """ValueError unless ``coefficients`` is a float [tokens, 4]."""
    if coefficients.shape != (tokens, len(COEFFICIENTS)) or coefficients.dtype not in (
        torch.float32,
        torch.float64,
    ):
        raise ValueError(
            f"coefficients is {_describe(coefficients)}, wanted float32 of shape "
            f"({tokens}, {len(COEFFICIENTS)}), columns {COEFFICIENTS}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _check_model(model: str, hidden: Tensor, weight: Tensor) -> None:
    names = [f"{model}_hidden", f"{model}_weight"] if model else ["hidden", "weight"]
    for name, tensor in zip(names, (hidden, weight), strict=True):
        if tensor.dim() != 2 or tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {_describe(tensor)}, wanted a floating-point matrix")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}, wanted a contiguous tensor (call .contiguous())"
            )
    if hidden.shape[1] != weight.shape[1]:
        wanted = f"(*, {hidden.shape[1]}): the columns of {names[0]}"
        raise ValueError(f"{names[1]} is {_describe(weight)}, wanted shape {wanted}")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{names[1]} is {weight.dtype} on {weight.device}, wanted {hidden.dtype} on {hidden.device} "
            f"like {names[0]}"
        )


def _check_pair(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        raise ValueError(
            f"teacher_hidden is {_describe(teacher_hidden)}, wanted {student_hidden.shape[0]} rows like "
            "student_hidden"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight is {_describe(teacher_weight)}, wanted {student_weight.shape[0]} rows like "
            "student_weight: both shards must cover the same vocabulary ids"
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, wanted {student_hidden.device} like "
            "student_hidden"
        )


def _check_labels(labels: Tensor, hidden: Tensor, shard: VocabShard) -> None:
    tokens = hidden.shape[0]
    if labels.shape != (tokens,) or labels.dtype != torch.int64 or labels.device != hidden.device:
        raise ValueError(
            f"labels is {_describe(labels)} on {labels.device}, wanted int64 of shape ({tokens},) "
            f"on {hidden.device}"
        )
    if tokens:
        low, high = (int(bound) for bound in labels.aminmax())
        # A label that no rank owns would count as a logit of 0, silently.
        if low < 0 or high >= shard.valid:
            raise ValueError(f"labels lie in [{low}, {high}], wanted [0, {shard.valid}) (shard.valid)")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, wanted > 0")
