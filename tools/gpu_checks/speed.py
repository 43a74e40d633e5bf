"""`kernels/split_kl/bench_gpu.py` in a short form, then time and memory against naive autograd, Liger and TRL."""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import torch
from sead_kernels.split_kl import BACKENDS, TileOptions
from sead_kernels.split_kl.bench_gpu import Problem, fastest, machine_limits, measure, seconds_of
from sead_kernels.split_kl.bench_variants import (
    Inputs,
    Shape,
    Variant,
    fused,
    liger,
    naive,
    naive_active,
    trl,
)

from gpu_checks.report import Context

# A rank of the primary target at TP 8: Nemotron Nano 8B <- Super 49B.
PROBLEM = Problem(16384, 8192, 4096, 8192, 128256 // 8)
TILES = ((1024, 4096), (4096, 4096), (8192, 16384))
SHAPE = Shape(tokens=4096, width=2048, vocabulary=128256, active=2048)
TOPK = 64

SMALL_PROBLEM = Problem(24, 12, 16, 32, 256, "float32")
SMALL_TILES = ((16, 64),)
SMALL_SHAPE = Shape(tokens=32, width=16, vocabulary=300, active=8)


def run(context: Context) -> None:
    """Both tables; a variant that runs out of memory has that for its result."""
    report, device = context.report, context.device
    usable = [
        name for name, backend in BACKENDS.items() if backend.unavailable(device, torch.float32) is None
    ]
    dtype = torch.bfloat16 if context.large else torch.float32
    problem, tiles, shape, repeats = (PROBLEM, TILES, SHAPE, 5)
    if not context.large:
        problem, tiles, shape, repeats = (SMALL_PROBLEM, SMALL_TILES, SMALL_SHAPE, 1)
    limits = machine_limits(device, dtype, repeats, large=context.large)
    report.number("limits", {"gemm_tflops": limits[0] / 1e12, "copy_gigabytes_per_second": limits[1] / 1e9})
    records: list[dict[str, Any]] = []
    for name in usable:
        with report.part(name):
            # One tile is enough for fused kernels: their logits have none.
            settings = [TileOptions(name, *tile) for tile in (tiles[:1] if name == "triton" else tiles)]
            records += measure(problem, device, settings, TOPK if context.large else 8, repeats, limits)
            report.number("passes", records)
    if records:
        report.number("fastest", fastest(records))
    report.number("against", against(context, shape, dtype, usable, repeats))


def against(
    context: Context, shape: Shape, dtype: torch.dtype, usable: list[str], repeats: int
) -> dict[str, Any]:
    """Milliseconds, TFLOP/s and peak MiB beyond the inputs of each variant, loss and gradients of the same batch."""
    variants = {"naive": Variant(naive, (4, 0)), "naive, active rows": Variant(naive_active, (0, 4))}
    if importlib.util.find_spec("liger_kernel"):
        variants["Liger JSD"] = Variant(liger, (0, 4))
    if importlib.util.find_spec("trl"):
        variants["TRL divergence"] = Variant(trl, (0, 6))
    variants |= {f"split_kl {name}": Variant(fused, (0, 6), name) for name in usable}
    inputs = Inputs.make(shape, context.device, dtype)
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        try:
            found[name] = _measured(context, inputs, shape, variant, repeats)
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        except Exception as error:  # a peer's kernel that fails is a result, ours is a failure
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if name.startswith("split_kl"):
                context.report.fail(f"{name}: {found[name]['error']}")
        inputs.hidden.grad = inputs.weight.grad = None
    naive_peak = found["naive"].get("peak_mib")
    for row in found.values():
        if naive_peak and row.get("peak_mib") is not None:
            row["of_naive"] = row["peak_mib"] / naive_peak
    return found


def _measured(
    context: Context, inputs: Inputs, shape: Shape, variant: Variant, repeats: int
) -> dict[str, Any]:
    device = context.device
    options = TileOptions(backend=variant.backend)

    def call() -> float:
        inputs.hidden.grad = inputs.weight.grad = None
        return variant.run(inputs, options)

    row: dict[str, Any] = {"loss": call()}
    if device.type == "cuda":
        inputs.hidden.grad = inputs.weight.grad = None
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds = seconds_of(call, device, repeats)
    row |= {"milliseconds": seconds * 1e3, "tflops": shape.gemm_flops(*variant.gemms) / seconds / 1e12}
    return row
