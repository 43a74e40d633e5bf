"""Argument checks: ValueError with the argument's name, what it is and what was wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tiling import TileOptions, VocabShard
from .topk import MAX_TOPK, NO_ID

# Columns of every ``coefficients`` tensor.
COEFFICIENTS = ("forward_kl", "reverse_kl", "entropy", "logprob")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_coefficients(
    coefficients: Tensor, hidden: Tensor, columns: tuple[str, ...] | None = COEFFICIENTS
) -> None:
    """ValueError unless ``coefficients`` is float32 (float64) on the device of ``hidden``, [tokens, columns].

    ``columns`` None: one number a token, [tokens].
    """
    shape = hidden.shape[:1] if columns is None else (hidden.shape[0], len(columns))
    if coefficients.shape != shape or coefficients.dtype not in (torch.float32, torch.float64):
        names = "" if columns is None else f", columns {columns}"
        raise ValueError(
            f"coefficients is {describe(coefficients)}, wanted float32 of shape {tuple(shape)}{names}"
        )
    if coefficients.device != hidden.device:
        raise ValueError(
            f"coefficients is on {coefficients.device}, wanted {hidden.device} like the hidden states"
        )


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def check_model(model: str, hidden: Tensor, weight: Tensor) -> None:
    names = [f"{model}_hidden", f"{model}_weight"] if model else ["hidden", "weight"]
    for name, tensor in zip(names, (hidden, weight), strict=True):
        if tensor.dim() != 2 or tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {describe(tensor)}, wanted a floating-point matrix")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}, wanted a contiguous tensor (call .contiguous())"
            )
    if hidden.shape[1] != weight.shape[1]:
        wanted = f"(*, {hidden.shape[1]}): the columns of {names[0]}"
        raise ValueError(f"{names[1]} is {describe(weight)}, wanted shape {wanted}")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{names[1]} is {weight.dtype} on {weight.device}, wanted {hidden.dtype} on {hidden.device} "
            f"like {names[0]}"
        )


def check_pair(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        raise ValueError(
            f"teacher_hidden is {describe(teacher_hidden)}, wanted {student_hidden.shape[0]} rows like "
            "student_hidden"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight is {describe(teacher_weight)}, wanted {student_weight.shape[0]} rows like "
            "student_weight: both shards must cover the same vocabulary ids"
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, wanted {student_hidden.device} like "
            "student_hidden"
        )


def check_labels(labels: Tensor, hidden: Tensor, shard: VocabShard, options: TileOptions) -> None:
    """Shape, dtype and device; with ``options.check_values`` the ids too, which waits for the device."""
    tokens = hidden.shape[0]
    if labels.shape != (tokens,) or labels.dtype != torch.int64 or labels.device != hidden.device:
        raise ValueError(
            f"labels is {describe(labels)} on {labels.device}, wanted int64 of shape ({tokens},) "
            f"on {hidden.device}"
        )
    if tokens and options.check_values:
        low, high = (int(bound) for bound in labels.aminmax())
        # A label that no rank owns would count as a logit of 0, silently.
        if low < 0 or high >= shard.valid:
            raise ValueError(f"labels lie in [{low}, {high}], wanted [0, {shard.valid}) (shard.valid)")


def check_temperature(temperature: float) -> None:
    # Beyond these a float32 logit over- or underflows.
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature is {temperature}, wanted > 0 (1e-6 to 1e6)")


def check_topk(topk: int, shard: VocabShard) -> None:
    limit = min(MAX_TOPK, shard.valid)
    if not 0 <= topk <= limit:
        raise ValueError(
            f"topk is {topk}, wanted 0 <= topk <= {limit}: the vocabulary has {shard.valid} tokens (shard.valid) "
            f"and the kernels keep up to {MAX_TOPK}"
        )


def check_support(name: str, ids: Tensor, hidden: Tensor) -> None:
    """Shape, dtype and device of the ids of a few entries per token."""
    tokens = hidden.shape[0]
    if ids.dim() != 2 or ids.shape[0] != tokens or ids.dtype != torch.int64 or ids.device != hidden.device:
        raise ValueError(
            f"{name} is {describe(ids)} on {ids.device}, wanted int64 of shape ({tokens}, *) on {hidden.device}"
        )


def active_rows(active: Tensor | None, coefficients: Tensor) -> Tensor:
    """``active``, or the rows of ``coefficients`` [T] or [T, n] with one that is not 0, int64.

    To find them waits for the device. ValueError unless ``active`` is an int64 vector on that device.
    """
    if active is None:
        weighted = coefficients if coefficients.dim() == 1 else coefficients.any(dim=1)
        return weighted.nonzero()[:, 0]
    if active.dim() != 1 or active.dtype != torch.int64 or active.device != coefficients.device:
        raise ValueError(
            f"active is {describe(active)} on {active.device}, wanted an int64 vector on {coefficients.device}"
        )
    return active


def check_columns(name: str, columns: dict[str, Tensor], tokens: int) -> None:
    for field, value in columns.items():
        if value.shape != (tokens,):
            raise ValueError(f"{name}.{field} is {describe(value)}, wanted shape ({tokens},)")


def check_rows(tokens: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[:1] != (tokens,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, wanted {tokens} rows like student_hidden"
            )


def check_target_ids(ids: Tensor, shard: VocabShard) -> None:
    """The ids of a top-k: an unknown or repeated one would count as probability mass that is not there.

    Waits for the device.
    """
    held = ids != NO_ID
    if held.any():
        low, high = (int(bound) for bound in ids[held].aminmax())
        if low < 0 or high >= shard.valid:
            raise ValueError(f"target.ids lie in [{low}, {high}], wanted [0, {shard.valid}) (shard.valid)")
        ordered = ids.sort(dim=1).values
        if bool(((ordered.diff(dim=1) == 0) & (ordered[:, 1:] != NO_ID)).any()):
            raise ValueError("target.ids has a repeated id in a row, wanted distinct ones")


def check_whole_vocabulary(weight: Tensor, shard: VocabShard, ranks: int) -> None:
    """Without other ranks the shard must be the vocabulary: the softmax would be over a part of it."""
    if ranks == 1 and (shard.start != 0 or weight.shape[0] < shard.valid):
        raise ValueError(
            f"student_weight has rows {shard.start} to {shard.start + weight.shape[0]} of {shard.valid} "
            "(shard.valid), wanted all of them: give the tensor-parallel group that holds the others as tp_group"
        )


def check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    if weight_grad is None:
        return
    if weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad is {describe(weight_grad)}, wanted shape {tuple(weight.shape)}")
    if weight_grad.dtype not in _FLOATS or weight_grad.device != weight.device:
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} on {weight_grad.device}, wanted a floating-point tensor on "
            f"{weight.device}"
        )


def check_finite(**tensors: Tensor) -> None:
    """Opt-in (``TileOptions.check_finite``): reads everything once and synchronises."""
    for name, value in tensors.items():
        tensor = value.detach()
        # Extrema first: they need no temporary of the tensor's size.
        if tensor.numel() and not all(math.isfinite(bound) for bound in tensor.aminmax()):
            bad = ~torch.isfinite(tensor)
            count, (row, column) = int(bad.sum()), bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} has {count} non-finite values, the first is {float(tensor[row, column])} at row {row}, "
                f"column {column}; wanted finite values"
            )
