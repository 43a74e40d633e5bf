"""Student and teacher of this rank, in their own layouts over the same world."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from sead_megatron.config import TrainConfig
from sead_megatron.models.build import build_model
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.load import load_output_shard, load_weights
from sead_megatron.parallel.groups import student_groups, teacher_groups
from sead_megatron.parallel.layout import Layout
from sead_megatron.training.student import Student
from sead_megatron.training.teacher import Teacher

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Models:
    """Both models on this rank."""

    student: Student
    teacher: Teacher
    teacher_output: torch.Tensor | None
    """The teacher's output layer in the student's vocabulary partition, on ranks of the student's last stage."""


def build_models(config: TrainConfig, device: torch.device) -> Models:
    """Builds both models with weights from their Hugging Face directories (a collective over the world).

    On the CPU `megatron_on_cpu.install` must have run.
    """
    on_cpu = device.type == "cpu"
    world = dist.get_world_size()
    s_layout = Layout(config.student.parallel.tensor, config.student.parallel.pipeline, world)
    t_layout = Layout(config.teacher.parallel.tensor, config.teacher.parallel.pipeline, world)
    s_groups, t_groups = student_groups(s_layout), teacher_groups(t_layout)
    model_parallel_cuda_manual_seed(config.seed)
    student_config = read_hf_config(config.student.path)
    teacher_config = read_hf_config(config.teacher.path)
    student_model = build_model(
        student_config,
        s_groups,
        _DTYPES[config.student.dtype],
        on_cpu=on_cpu,
        trainable=True,
        sequence_parallel=config.student.parallel.sequence_parallel,
        recompute=config.student.recompute == "full",
        stages=config.student.parallel.stages,
    )
    load_weights(student_model, config.student.path)
    teacher_model = build_model(
        teacher_config,
        t_groups,
        _DTYPES[config.teacher.dtype],
        on_cpu=on_cpu,
        trainable=False,
        sequence_parallel=config.teacher.parallel.sequence_parallel,
        stages=config.teacher.parallel.stages,
    )
    load_weights(teacher_model, config.teacher.path)
    teacher_output = (
        load_output_shard(
            teacher_config, config.teacher.path, s_groups, _DTYPES[config.teacher.dtype], device
        )
        if s_groups.is_last_stage
        else None
    )
    teacher = Teacher(
        teacher_model,
        s_groups,
        device=device,
        sequence_parallel=config.teacher.parallel.sequence_parallel,
        max_tokens=config.batch.max_tokens_per_microbatch,
        packing=config.batch.packing,
        offload_hidden=config.teacher.offload_hidden,
    )
    return Models(Student(student_model, teacher_output, config, device), teacher, teacher_output)
