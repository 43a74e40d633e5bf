"""Scoring, token statistics and a training step in float32: on the device and on the CPU, number for number.

The CPU's side runs in a process of its own, since Megatron is redirected for a whole process.

    python -m gpu_checks.step DIRECTORY cpu      # writes DIRECTORY/step_cpu.pt
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_checks.pair import SMALL, TINY, Load, config_of, write_pair
from gpu_checks.report import Context, Report, largest, relative_norm
from gpu_checks.world import Stepper, join_world

# Ten to a hundred times what another order of float32 sums costs (1e-7 to 1e-6 between two kernel backends on the CPU).
HIDDEN = 1e-5
STATISTICS = 1e-4
LOSS = 1e-5
GRADIENT_NORM = 1e-4
GRADIENTS = 1e-4
# Adam divides by the root of the gradient's square: a small gradient's error comes back in full.
WEIGHTS = 1e-4

SMALL_LOAD = Load(count=8, prompt=32, response=200, row=512)
TINY_LOAD = Load(count=4, prompt=8, response=24, row=64)


def run(context: Context) -> None:
    """Both sides, then the comparison."""
    directory = context.directory / "step"
    directory.mkdir()
    shape, load = (SMALL, SMALL_LOAD) if context.large else (TINY, TINY_LOAD)
    write_pair(directory, shape, torch.float32, torch.device("cpu"))
    command = [sys.executable, "-m", "gpu_checks.step", str(directory), "cpu", str(int(context.large))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4" if context.large else "1"}
    log = directory / "cpu.log"
    with log.open("w") as output:
        other = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            ours = one_step(directory, load, context.device)
            code = other.wait()
        finally:
            other.kill()
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-3:]
        raise RuntimeError(f"the CPU's side ended with exit code {code}: {' | '.join(last)}")
    compare(context.report, ours, torch.load(directory / "step_cpu.pt"))


def one_step(directory: Path, load: Load, device: torch.device) -> dict[str, Any]:
    """All numbers of one step, on the CPU."""
    device = join_world(device, directory)
    config = config_of(directory / "student", directory / "teacher", load, device, torch.float32)
    stepper = Stepper.build(config, load, device)
    scores = stepper.score()
    statistics = stepper.token_stats(scores)
    update = stepper.train_step(scores)
    return {
        "hidden": scores.parts[0].hidden.cpu(),
        "statistics": {name: column.cpu() for name, column in statistics.items()},
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "applied": update.applied,
        "columns": {name: column.cpu() for name, column in update.columns.items()},
        "gradients": stepper.gradients(),
        "weights": stepper.weights(),
    }


def compare(report: Report, ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every number of the step against the CPU's."""
    report.number("loss", {"device": ours["loss"], "cpu": expected["loss"]})
    if not (ours["applied"] and expected["applied"]):
        report.fail(f"update applied: {ours['applied']} on the device, {expected['applied']} on the CPU")
    report.compare("teacher hidden states", relative_norm(ours["hidden"], expected["hidden"]), HIDDEN)
    for group, label in (("statistics", "token_stats"), ("columns", "train_step")):
        for name, column in expected[group].items():
            report.compare(f"{label} {name}", largest(ours[group][name], column), STATISTICS)
    for name, tolerance in (("loss", LOSS), ("grad_norm", GRADIENT_NORM)):
        error = abs(ours[name] - expected[name]) / abs(expected[name])
        report.compare(f"train_step {name}", error, tolerance)
    for group, tolerance in (("gradients", GRADIENTS), ("weights", WEIGHTS)):
        error, name = worst(ours[group], expected[group])
        report.compare(f"train_step {group}", error, tolerance)
        report.number(f"train_step {group}, worst of {len(expected[group])}", name)


def worst(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error in the norm of a tensor, and the tensor's name. NaN is the largest of all."""
    errors = {name: relative_norm(ours[name], tensor) for name, tensor in expected.items()}
    name = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return errors[name], name


if __name__ == "__main__":
    given, kind, large = sys.argv[1:]
    result = one_step(Path(given), SMALL_LOAD if int(large) else TINY_LOAD, torch.device(kind))
    torch.save(result, Path(given) / f"step_{kind}.pt")
