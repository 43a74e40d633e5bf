"""Can the teachers do what the configuration asks of them? Their layouts and formats aside."""

from collections.abc import Mapping
from dataclasses import replace

from sead_megatron.config.models import ParallelConfig, TeacherConfig
from sead_megatron.config.schema import TrainConfig
from sead_megatron.data.prompts import PromptRecord
from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import HFConfig


def check_needed(config: TrainConfig) -> None:
    """Is there a teacher where the objective reads one, and none where it does not? Raises UserError."""
    teacher, objective = config.teacher, config.objective
    if objective.needs_teacher:
        if not teacher.directories:
            raise UserError(
                "teacher.path",
                None,
                f"required with objective {objective.name}",
                "add it, or teacher.domains",
            )
    elif teacher != TeacherConfig():
        raise UserError(
            "teacher",
            teacher.label,
            f"objective {objective.name} as it is set reads no teacher",
            "remove the section, or override it with teacher={}",
        )


def check_lists(config: TrainConfig) -> None:
    """Is there a teacher to compare lists of likely tokens with? Raises UserError."""
    objective = config.objective
    if not config.metrics.topk_lists or config.teachers:
        return
    if objective.reads_cache:
        why = f"compares with the teacher, which objective {objective.name} does not load"
    else:
        why = f"compares with a teacher, and objective {objective.name} as it is set reads none"
    raise UserError("metrics.topk_lists", config.metrics.topk_lists, why, "use 0")


def check_domains(config: TrainConfig, prompts: list[PromptRecord]) -> None:
    """Has every training prompt a teacher, and every teacher prompts? Raises UserError."""
    teacher = config.teacher
    found = sorted({prompt.domain for prompt in prompts if prompt.domain is not None})
    for domain in teacher.domains:
        if domain not in found:
            there = f"this domain; there are {alternatives(found, last='and')}" if found else "a domain"
            raise UserError(
                f"teacher.domains.{domain}",
                teacher.domains[domain],
                f"no training prompt has {there}",
                "remove it, or give the prompts their domain",
            )
    without = [prompt for prompt in prompts if prompt.domain not in teacher.domains]
    if teacher.path is None and without:
        first = without[0]
        whose = "no domain" if first.domain is None else f"the domain {first.domain!r}"
        raise UserError(
            "teacher.path",
            None,
            f"{len(without)} of {len(prompts)} training prompts have no teacher in teacher.domains, the first "
            f"{first.id!r} with {whose}",
            "add it for all other prompts, or their domains",
        )


def check_moving(config: TrainConfig, student: HFConfig, teachers: Mapping[str, HFConfig]) -> None:
    """Can the teacher follow the student: are they the same model, cut alike? Raises UserError."""
    teacher, ema = config.teacher, config.teacher.ema
    if ema is None:
        return
    if teacher.domains:
        raise UserError(
            "teacher.ema", ema, "only a single teacher follows the student", "remove it, or teacher.domains"
        )
    if config.precision.teacher not in ("bfloat16", "float32"):
        raise UserError(
            "precision.teacher",
            config.precision.teacher,
            "a teacher that follows the student (teacher.ema) is not quantised",
            "use bfloat16",
        )
    if any(_shape(model) != _shape(student) for model in teachers.values()):
        raise UserError(
            "teacher.path",
            teacher.path,
            "a teacher that follows the student (teacher.ema) must be of the student's architecture",
            f"use for example {config.student.path}",
        )
    ours, theirs = (_cut(model.parallel) for model in (config.student, teacher))
    if ours != theirs:
        raise UserError(
            "teacher.parallel",
            ", ".join(f"{name} {value}" for name, value in theirs.items() if value is not None),
            "a teacher that follows the student (teacher.ema) is cut as the student is: must be "
            + ", ".join(f"{name} {value}" for name, value in ours.items() if value is not None),
            "use student.parallel's",
        )


def _shape(model: HFConfig) -> HFConfig:
    """What makes weights of two models averages of each other; the longest sequence and the tokenizer's ids do not."""
    return replace(model, max_position_embeddings=0, eos_ids=(), raw={})


def _cut(parallel: ParallelConfig) -> dict[str, object]:
    return parallel.model_dump(include={"tensor", "pipeline", "stages"})
