"""The layouts of student, teacher and engine that make a step shortest and fit into memory. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sead_megatron.config import TrainConfig
from sead_megatron.config.checks_layout import check_layouts
from sead_megatron.config.checks_precision import check_precision
from sead_megatron.errors import UserError
from sead_megatron.plan.devices import GIB, Device
from sead_megatron.plan.fit import fits
from sead_megatron.plan.lengths import Lengths
from sead_megatron.plan.memory import RankMemory, Run, plan_memory
from sead_megatron.plan.timing import Assumptions, StepTime, estimate

_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits, its overrides, its fullest rank and its time."""

    run: Run
    overrides: tuple[str, ...]
    memory: RankMemory
    time: StepTime


def search(
    run: Run, lengths: Lengths, assumptions: Assumptions, *, count: int = 8, fp8_rollouts: bool = True
) -> list[Candidate]:
    """The `count` fastest candidates, fastest first; of equal times the one with the most memory left.

    The three layouts are searched together, since they share the memory; each phase's time depends on one of them.
    KV caches are as large as all of an engine's sequences at their longest. `fp8_rollouts`: try FP8 engines too.
    """
    device = run.device
    if device is None:
        raise ValueError("layouts are searched for a GPU")
    clock = _Clock(lengths, assumptions)
    timed = []
    for overrides in _combinations(run.config, device, fp8_rollouts=fp8_rollouts):
        candidate = _with(run, overrides)
        if candidate is not None:
            timed.append((clock.time(candidate), overrides, candidate))
    timed.sort(key=lambda entry: round(entry[0].total, 2))
    found: list[Candidate] = []
    for time, overrides, candidate in timed:
        if len(found) >= count and round(time.total, 2) > round(found[-1].time.total, 2):
            break
        memory = _fullest(candidate)
        if fits(memory, device.memory_bytes):
            found.append(Candidate(candidate, _as_text(overrides), memory, time))
    return sorted(found, key=lambda entry: (round(entry.time.total, 2), entry.memory.peak))[:count]


class _Clock:
    """Estimates by parts: many candidates share a phase, and each phase sees only some of the layouts."""

    def __init__(self, lengths: Lengths, assumptions: Assumptions) -> None:
        self._lengths = lengths
        self._assumptions = assumptions
        self._parts: dict[tuple[object, ...], StepTime] = {}

    def time(self, run: Run) -> StepTime:
        student, config = run.student_layout, run.config
        rollout = self._part(run, "rollout", config.rollout.tensor_parallel, config.rollout.quantization)
        teacher = self._part(run, "teacher", run.teacher_layout, student.pipeline, student.data)
        update = self._part(run, "update", student, config.student.recompute)
        return replace(
            update,
            rollout=rollout.rollout,
            rollout_tail=rollout.rollout_tail,
            teacher=teacher.teacher,
            flops=rollout.flops | {"teacher": teacher.flops["teacher"], "update": update.flops["update"]},
        )

    def _part(self, run: Run, *key: object) -> StepTime:
        if key not in self._parts:
            self._parts[key] = estimate(run, self._lengths, self._assumptions)
        return self._parts[key]


def _combinations(config: TrainConfig, device: Device, *, fp8_rollouts: bool) -> Iterator[dict[str, Any]]:
    tensor = [size for size in _SIZES if size <= device.gpus_per_node]
    quantizations = ["none", "fp8"] if fp8_rollouts else [config.rollout.quantization]
    for student_tensor, student_pipeline, recompute in itertools.product(tensor, (1, 2, 4), ("none", "full")):
        for teacher_tensor, teacher_pipeline in itertools.product(tensor, _SIZES):
            for rollout_tensor, quantization in itertools.product(tensor, quantizations):
                yield {
                    "student.parallel.tensor": student_tensor,
                    "student.parallel.pipeline": student_pipeline,
                    "student.recompute": recompute,
                    "teacher.parallel.tensor": teacher_tensor,
                    "teacher.parallel.pipeline": teacher_pipeline,
                    "rollout.tensor_parallel": rollout_tensor,
                    "rollout.quantization": quantization,
                }


def _with(run: Run, overrides: dict[str, Any]) -> Run | None:
    """The run with overrides and a KV cache to match; None for layouts that cannot be."""
    raw = run.config.model_dump()
    for model in ("student", "teacher"):
        raw[model]["parallel"] |= {"stages": None, "sequence": None}
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    candidate = replace(run, config=TrainConfig.model_validate(raw))
    try:
        teachers = dict(zip(candidate.config.teachers.values(), run.teachers, strict=True))
        check_layouts(candidate.config, run.world, run.student, teachers)
        check_precision(candidate.config, run.student, teachers)
    except UserError:
        return None
    overrides["rollout.kv_cache_gib"] = _kv_cache_gib(candidate)
    raw["rollout"]["kv_cache_gib"] = overrides["rollout.kv_cache_gib"]
    return replace(candidate, config=TrainConfig.model_validate(raw))


def _kv_cache_gib(run: Run) -> float:
    """Of all sequences that an engine runs at once, at their longest, in steps of a quarter."""
    rollout = run.config.rollout
    engines = run.world // rollout.tensor_parallel
    sequences = min(rollout.max_num_seqs, -(-run.rollouts // engines))
    size = sequences * rollout.max_model_len * run.kv_bytes_per_token() / GIB
    return max(0.25, -(-size // 0.25) * 0.25)


def _fullest(run: Run) -> RankMemory:
    """All blocks hold the same but for shares of the optimizer, of which the first replica's is a full one."""
    block = max(run.student_layout.block_size, run.teacher_layout.block_size)
    return max(plan_memory(run, range(block)), key=lambda rank: rank.peak)


def _as_text(overrides: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in overrides.items())
