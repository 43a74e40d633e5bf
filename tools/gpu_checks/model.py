"""A pair of 1B models in bfloat16: seconds of each phase, launches and synchronisations of a step, memory and the plan.

Responses are all of the longest length, so that the plan's worst case is what happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_checks.pair import BILLION, TINY, Load, config_of, write_pair
from gpu_checks.report import Context, Report
from gpu_checks.world import Stepper, join_world
from sead_megatron.config import TrainConfig
from sead_megatron.models.export import HFStream
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.megatron_config import uses_transformer_engine
from sead_megatron.plan.devices import DEVICES, GIB
from sead_megatron.plan.memory import Run, plan_memory

LOAD = Load(count=8, prompt=256, response=1792, row=8192, full=True)
TINY_LOAD = Load(count=4, prompt=8, response=24, row=64, full=True)
STEPS = 3
# Of the plan: as much as the rehearsals of full sizes allow.
OF_PLAN = 0.15

# Calls of the runtime and the driver, as the profiler names them.
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def run(context: Context) -> None:
    """Builds the pair, runs `STEPS` steps and one more under the profiler."""
    directory = context.directory / "model"
    directory.mkdir()
    shape, load = (BILLION, LOAD) if context.large else (TINY, TINY_LOAD)
    report = context.report
    clock = Clock(context.device)
    with clock.phase("write models"):
        write_pair(directory, shape, torch.bfloat16, context.device)
    device = join_world(context.device, directory)
    config = config_of(directory / "student", directory / "teacher", load, device, torch.bfloat16)
    with clock.phase("build and load"):
        stepper = Stepper.build(config, load, device)
    report.number("build_seconds", clock.seconds)
    report.number(
        "layers", "Transformer Engine" if uses_transformer_engine(device.type == "cpu") else "local"
    )
    report.number("parameters", sum(p.numel() for p in stepper.models.student.model.module.parameters()))
    for number in range(1, STEPS + 1):
        clock = Clock(device)
        tokens = _step(stepper, config, clock)
        report.number(f"step {number} seconds", clock.seconds)
        report.number(f"step {number} peak GiB", clock.peaks)
        seconds = sum(clock.seconds[name] for name in ("score", "token_stats", "train_step"))
        report.number(f"step {number} tokens per second", round(tokens / seconds, 1))
    # Of tiny tensors most memory is what the allocator rounds up.
    _compare_with_plan(report, config, {} if context.tiny else clock.peaks, device)
    scores = stepper.score()
    for name, call in (("score", stepper.score), ("train_step", lambda: stepper.train_step(scores))):
        with report.part(f"profile of {name}"):
            report.number(f"calls in {name}", calls_of(call, device))


class Clock:
    """Seconds and peak memory of phases, each of which ends when the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def phase(self, name: str) -> _Phase:
        """A phase as a context."""
        return _Phase(self, name)

    def start(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def stop(self, name: str, started: float) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            self.peaks[name] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        self.seconds[name] = round(time.perf_counter() - started, 4)


class _Phase:
    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._started = self._clock.start()

    def __exit__(self, *error: object) -> None:
        self._clock.stop(self._name, self._started)


def _step(stepper: Stepper, config: TrainConfig, clock: Clock) -> int:
    """One step and a weight stream; tokens of the batch."""
    with clock.phase("score"):
        scores = stepper.score()
    with clock.phase("token_stats"):
        stepper.token_stats(scores)
    with clock.phase("train_step"):
        stepper.train_step(scores)
    with clock.phase("weight stream"):
        for _ in HFStream(stepper.models.student.model, config.rollout.sync_bucket_mib):
            pass
    return sum(rollout.length for rollout in stepper.plan.rollouts)


def _compare_with_plan(
    report: Report, config: TrainConfig, peaks: dict[str, float], device: torch.device
) -> None:
    """Allocated bytes of the phases against `sead_megatron.plan`, without what torch's allocator does not see."""
    planned = planned_gib(config, fused=uses_transformer_engine(device.type == "cpu"))
    for phase, of_step in (("teacher", "score"), ("update", "train_step")):
        measured = peaks.get(of_step)
        entry = {"planned": round(planned[phase], 3), "measured": measured}
        report.number(f"memory of {phase}, GiB", entry)
        if measured is not None:
            error = abs(measured / planned[phase] - 1)
            report.compare(f"memory of {phase}: |measured / planned - 1|", error, OF_PLAN)


def planned_gib(config: TrainConfig, *, fused: bool) -> dict[str, float]:
    """The plan's peaks of the two phases, GiB: no engine, no CUDA context. `fused`: Transformer Engine's layers."""
    student = read_hf_config(config.student.path)
    teachers = tuple(read_hf_config(path) for path in config.teachers)
    run = Run(config, student, teachers, 1, DEVICES["h100"] if fused else None)
    (rank,) = plan_memory(run)
    unseen = ("process", *rank.phases["rollout"], "engine asleep")
    return {
        phase: sum(size for term, size in rank.terms(phase).items() if term not in unseen) / GIB
        for phase in ("teacher", "update")
    }


def calls_of(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Kernel launches, synchronisations and copies to the host of a call, as torch's profiler saw them."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    counts = {"launches": 0, "synchronisations": 0, "copies to the host": 0, "operators": 0}
    for event in recorded.events():
        counts["launches"] += event.name in LAUNCHES
        counts["synchronisations"] += event.name in SYNCHRONISATIONS
        counts["copies to the host"] += event.name.startswith("Memcpy DtoH")
        counts["operators"] += event.name.startswith("aten::")
    return counts
