"""Student and teachers of this rank, in their own layouts over the same world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from sead_megatron.config import ParallelConfig, TrainConfig
from sead_megatron.data.packing import PackedRow, build_row, pack_rows
from sead_megatron.data.types import Prompt, Rollout
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.build import BuiltModel, build_model
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.load import load_output_shard, load_weights
from sead_megatron.models.olmo3 import with_yarn_on_all_layers
from sead_megatron.models.precision import (
    Precision,
    reference_precision,
    student_precision,
    teacher_precision,
)
from sead_megatron.parallel.groups import ParallelGroups, student_groups, teacher_groups
from sead_megatron.parallel.layout import Layout
from sead_megatron.training.moving_teacher import MovingTeacher
from sead_megatron.training.student import Student
from sead_megatron.training.teacher import Teacher
from sead_megatron.training.teachers import Teachers


@dataclass(frozen=True, eq=False)
class Models:
    """All models on this rank."""

    student: Student
    teachers: Teachers
    reference: Teacher | None = None
    """The frozen reference model, where one is configured."""
    moving: MovingTeacher | None = None
    """What moves the teacher, where it follows the student."""


def build_models(config: TrainConfig, device: torch.device, prompts: Sequence[Prompt] = ()) -> Models:
    """Builds all models with weights from their directories (a collective over the world).

    `prompts`: tokenised training prompts, of which `precision.teacher: modelopt_fp8` takes the first ones. On the CPU
    `megatron_on_cpu.install` must have run.
    """
    world = dist.get_world_size()
    s_layout = Layout(config.student.parallel.tensor, config.student.parallel.pipeline, world)
    s_groups = student_groups(s_layout)
    model_parallel_cuda_manual_seed(config.seed)
    student_model = build_model(
        read_hf_config(config.student.path),
        s_groups,
        student_precision(config.precision),
        on_cpu=device.type == "cpu",
        trainable=True,
        sequence_parallel=config.student.parallel.sequence_parallel,
        recompute=config.student.recompute == "full",
        stages=config.student.parallel.stages,
    )
    load_weights(student_model, config.student.path)
    members = []
    if config.teachers:
        t_groups = teacher_groups(
            Layout(config.teacher.parallel.tensor, config.teacher.parallel.pipeline, world)
        )
        members = [_teacher(path, config, t_groups, s_groups, device, prompts) for path in config.teachers]
    teachers = Teachers(members)
    student = Student(student_model, config, device)
    moving = None
    if config.teacher.ema is not None:
        moving = MovingTeacher(teachers.members[0], student_model, config.teacher.ema)
    return Models(student, teachers, _reference(config, s_groups, device), moving)


def _reference(config: TrainConfig, student_groups: ParallelGroups, device: torch.device) -> Teacher | None:
    if config.reference is None:
        return None
    parallel, path = config.reference.parallel, config.reference.path
    groups = teacher_groups(Layout(parallel.tensor, parallel.pipeline, dist.get_world_size()))
    precision = reference_precision(config.precision)
    model = _frozen_model(precision, read_hf_config(path), path, parallel, groups, device)
    return _frozen(model, path, student_groups, config, parallel, device)


def _frozen(
    model: BuiltModel,
    path: str,
    student_groups: ParallelGroups,
    config: TrainConfig,
    parallel: ParallelConfig,
    device: torch.device,
) -> Teacher:
    return Teacher(
        model,
        _output_shard(model, path, student_groups, config, device),
        student_groups,
        device=device,
        sequence_parallel=parallel.sequence_parallel,
        max_tokens=config.batch.max_tokens_per_microbatch,
        packing=config.batch.packing,
        offload_hidden=config.teacher.offload_hidden,
    )


def _output_shard(
    model: BuiltModel, path: str, student_groups: ParallelGroups, config: TrainConfig, device: torch.device
) -> torch.Tensor | None:
    """A frozen model's output layer in the student's vocabulary partition; None off the student's last stage."""
    if not student_groups.is_last_stage:
        return None
    dtype = teacher_precision(config.precision).dtype
    return load_output_shard(model.config, path, student_groups, dtype, device)


def _teacher(
    path: str,
    config: TrainConfig,
    groups: ParallelGroups,
    student_groups: ParallelGroups,
    device: torch.device,
    prompts: Sequence[Prompt],
) -> Teacher:
    architecture = read_hf_config(path)
    if config.teacher.yarn_layers == "all":
        architecture = with_yarn_on_all_layers(architecture)
    parallel = config.teacher.parallel
    precision = teacher_precision(config.precision)
    model = _frozen_model(precision, architecture, path, parallel, groups, device)
    if config.precision.teacher == "modelopt_fp8":
        from sead_megatron.training.quantize import quantize_fp8

        rows = _calibration_rows(config, model, prompts)
        keep = config.precision.first_last_bfloat16
        quantize_fp8(model, rows, device, keep_first_last=keep)
    return _frozen(model, path, student_groups, config, parallel, device)


def _frozen_model(
    precision: Precision,
    architecture: HFConfig,
    path: str,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    device: torch.device,
) -> BuiltModel:
    model = build_model(
        architecture,
        groups,
        precision,
        on_cpu=device.type == "cpu",
        trainable=False,
        sequence_parallel=parallel.sequence_parallel,
        stages=parallel.stages,
    )
    load_weights(model, path)
    return model


def _calibration_rows(config: TrainConfig, model: BuiltModel, prompts: Sequence[Prompt]) -> list[PackedRow]:
    """The first training prompts as packed rows, the same on every rank."""
    nothing = np.zeros(0, dtype=np.float32)
    rollouts = [
        Rollout(
            prompt_index=i,
            prompt_ids=np.asarray(prompt.token_ids, dtype=np.int32),
            response_ids=nothing.astype(np.int32),
            logprobs=nothing,
            entropies=nothing,
            finished=True,
            weight_version=0,
        )
        for i, prompt in enumerate(prompts[: config.precision.calibration_prompts])
    ]
    lengths = {i: rollout.length for i, rollout in enumerate(rollouts)}
    rows = pack_rows(lengths, list(lengths), config.batch.max_tokens_per_microbatch, config.batch.packing)
    offsets = torch.zeros(len(rollouts) + 1, dtype=torch.int64)
    return [build_row(row, rollouts, offsets, model.row_multiple) for row in rows]
