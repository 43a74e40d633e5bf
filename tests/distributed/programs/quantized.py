"""A teacher quantised by ModelOpt in several layouts: scales, hidden states and the arithmetic of a layer."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import rank
import torch
import torch.distributed as dist
from tiny_models import fixed_rollout

E4M3_MAX = 448.0


def body(directory: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports of all cases: amaxes by global layer name and the last hidden states of the calibration rows."""
    return [run_case(case, directory) for case in cases]


def run_case(case: dict[str, Any], directory: str) -> dict[str, Any]:
    from sead_megatron.models.build import build_model
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.load import load_weights
    from sead_megatron.models.precision import Precision
    from sead_megatron.parallel.groups import destroy_groups, student_groups, teacher_groups
    from sead_megatron.parallel.layout import Layout
    from sead_megatron.training import quantize

    # Megatron's global state belongs to the student, whose layout is another one.
    student_groups(Layout(1, 1, dist.get_world_size()))
    groups = teacher_groups(Layout(case["tensor"], case["pipeline"], dist.get_world_size()))
    model = build_model(
        read_hf_config(directory), groups, Precision(torch.float32), on_cpu=True, trainable=False
    )
    load_weights(model, directory)
    rows = calibration_rows(model.row_multiple)
    device = torch.device("cpu")
    own = mock.patch.object(quantize, "_use_own_groups", quantize._use_own_groups if case["own"] else forget)
    with own:
        quantize.quantize_fp8(model, rows, device, keep_first_last=case["keep"])
    report = {
        "amax": gather(amaxes(model)),
        "hidden": hidden_states(model, rows, device),
        "rounding": max((rounding(module) for _, module in quantized(model)), default=0.0),
    }
    destroy_groups()
    return report


def forget(model: Any) -> None:
    """Negative control: ModelOpt takes the groups that Megatron's global state knows."""


def calibration_rows(multiple: int) -> list[Any]:
    from sead_megatron.data.packing import build_row

    generator = np.random.default_rng(0)
    rollouts = [fixed_rollout(generator.integers(3, 250, 24).tolist(), []) for _ in range(3)]
    offsets = torch.zeros(len(rollouts) + 1, dtype=torch.int64)
    return [build_row([i], rollouts, offsets, multiple) for i in range(len(rollouts))]


def quantized(model: Any) -> list[tuple[str, Any]]:
    """This rank's layers whose quantizers are on, by their name in the whole model."""
    found = []
    for name, module in model.module.named_modules():
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False):
            parts = name.split(".")
            parts[2] = str(int(parts[2]) + model.weights._layer_offset)
            found.append((".".join(parts), module))
    return found


def amaxes(model: Any) -> dict[str, list[float]]:
    return {
        name: [float(module.weight_quantizer.amax), float(module.input_quantizer.amax)]
        for name, module in quantized(model)
    }


def gather(mine: dict[str, list[float]]) -> dict[str, list[list[float]]]:
    """The values of every rank that holds a layer."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    merged: dict[str, list[list[float]]] = {}
    for values in ranks:
        for name, value in values.items():
            merged.setdefault(name, []).append(value)
    return merged


def hidden_states(model: Any, rows: list[Any], device: torch.device) -> list[float]:
    """Of the first row's last token, from the last stage of the first replica."""
    from sead_megatron.training.pipeline import forward_row, run_rows

    def step(remaining: Any, stage: Any) -> Any:
        return forward_row(stage, next(remaining)), lambda hidden, non_loss_data=True: hidden[-1, 0]

    with torch.no_grad():
        outputs = run_rows(model.module, model.groups, rows, step, train=False)
    mine = [output.tolist() for output in outputs] if model.groups.is_last_stage else None
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return next(found for found in ranks if found)[0]


def rounding(module: Any) -> float:
    """Largest relative difference of a layer's quantised weight and torch's own cast to E4M3."""
    scale = module.weight_quantizer.amax / E4M3_MAX
    expected = (module.weight / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale
    actual = module.weight_quantizer(module.weight)
    return float((actual - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    rank.run(body)
