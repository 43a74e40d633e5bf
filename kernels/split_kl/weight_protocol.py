"""How a loss node hands its gradients over: active rows back in place, the weight's as Megatron wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (weight_grad to add to or None, weight_requires_grad) -> (dh of the active rows, dW or None).
Pass2 = Callable[[Tensor | None, bool], tuple[Tensor, Tensor | None]]


def select_rows(tensor: Tensor, active: Tensor) -> Tensor:
    """Active rows; the tensor itself where they are all of it."""
    return tensor if active.numel() == tensor.shape[0] else tensor.index_select(0, active)


def input_gradients(
    ctx: Any, hidden: Tensor, active: Tensor, pass2: Pass2
) -> tuple[Tensor | None, Tensor | None]:
    """What ``backward`` returns for its first two inputs, the hidden states and the weight.

    Args:
        ctx: the node's context; ``weight``, the parameter itself, and ``settings.weight_tied`` are read of it.

    With a ``main_grad`` (Megatron DDP) the weight's gradient is added to it by ``pass2``, and autograd gets the
    dummy that Megatron's own linear layers return, or None for a tied weight.

    Raises:
        RuntimeError: under ``create_graph=True``. The gradients would come out as constants, silently.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the split-KL losses have no second derivative: call backward without create_graph"
        )
    weight: Tensor = ctx.weight
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    main_grad = getattr(weight, "main_grad", None) if wants_weight else None
    hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
    weight_grad = None
    if active.numel():
        rows_grad, weight_grad = pass2(main_grad, wants_weight)
        if hidden_grad is not None:
            hidden_grad.index_copy_(0, active, rows_grad.to(hidden.dtype))
    if wants_weight and main_grad is not None:
        weight_grad = None if ctx.settings.weight_tied else _dummy_gradient(weight)
    elif wants_weight and weight_grad is None:
        weight_grad = torch.zeros_like(weight)
    return hidden_grad, weight_grad


def _dummy_gradient(weight: Tensor) -> Tensor:
    """What fires the hook of a parameter whose gradient is already in ``main_grad``, and marks it so.

    Follows ``LinearWithGradAccumulationAndAsyncCommunication.backward`` of megatron-core 0.16.1: DDP's hook
    wants a gradient to exist (overlap_grad_reduce asserts it) and does not read it, unless ``zero_out_wgrad``
    makes it. Without DDP's flag there is no such hook, and the dummy must be harmless to whoever reads
    ``weight.grad``.
    """
    unread = hasattr(weight, "grad_added_to_main_grad") and not getattr(weight, "zero_out_wgrad", False)
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010
    return torch.empty_like(weight) if unread else torch.zeros_like(weight)
