"""A teacher whose linear layers are quantised to FP8 by ModelOpt, after its weights are loaded.

E4M3 with one scale per weight and one per activation, both measured: the weights' largest magnitudes, and the inputs'
over some training prompts. On a GPU the weights are then stored in FP8; elsewhere they keep their dtype and carry
FP8's rounding, which is the same arithmetic (`docs/precision.md` measures what it does to the method).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.utils.distributed import ParallelState
from torch import Tensor

from sead_megatron.data.packing import PackedRow
from sead_megatron.models.build import BuiltModel
from sead_megatron.training.device_rows import row_to_device
from sead_megatron.training.pipeline import forward_row, run_rows


def quantize_fp8(
    model: BuiltModel, rows: Sequence[PackedRow], device: torch.device, *, keep_first_last: bool = True
) -> None:
    """Quantises the linear layers of a loaded frozen model in place; a collective over the model's ranks.

    Args:
        model: without gradients; its embedding, norms and attention products stay as they are.
        rows: what the scales of the activations are measured on, the same on every rank.
        keep_first_last: leave the model's first and last decoder layer alone.
    """
    if not rows:
        raise ValueError("activation scales need at least one row")
    _use_own_groups(model)
    with torch.no_grad():
        mtq.quantize(model.module, mtq.FP8_DEFAULT_CFG, lambda module: _measure(module, model, rows, device))
    if keep_first_last:
        for prefix in _ends(model):
            mtq.disable_quantizer(model.module, f"{prefix}*")
    if device.type == "cuda":
        # ModelOpt 0.47 registers its FP8 GEMM when this is imported, which nothing of its own does. Without it every
        # layer's weights are expanded again in each pass and multiplied in bfloat16.
        importlib.import_module("modelopt.torch.quantization.backends.fp8_per_tensor_gemm")
        mtq.compress(model.module)
        # What the weights took in bfloat16 goes back to the device: the engine's allocator is another one.
        torch.cuda.empty_cache()


def _use_own_groups(model: BuiltModel) -> None:
    """Largest magnitudes are shared over the model's own groups.

    ModelOpt 0.47 would ask Megatron's global state, which knows the student's: a teacher in another layout would get
    scales from ranks that hold other layers, or wait for ranks that never come.
    """
    collection = model.groups.collection
    state = ParallelState(collection.dp, collection.tp)
    for module in model.module.modules():
        module._parallel_state = state


def _measure(module: Any, model: BuiltModel, rows: Sequence[PackedRow], device: torch.device) -> None:
    def step(remaining: Iterator[PackedRow], stage: Any) -> tuple[Tensor, Any]:
        output = forward_row(stage, next(remaining))
        return output, lambda hidden, non_loss_data=True: None

    run_rows(module, model.groups, [row_to_device(row, device) for row in rows], step, train=False)


def _ends(model: BuiltModel) -> list[str]:
    """Names of the model's first and last decoder layer, where this stage holds them."""
    groups = model.groups
    layers = len(model.module.decoder.layers)
    ends = ["decoder.layers.0."] if groups.is_first_stage else []
    return ends + ([f"decoder.layers.{layers - 1}."] if groups.is_last_stage else [])
