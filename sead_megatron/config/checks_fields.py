"""Do the fields agree with each other and with the models' config.json? No file is opened here."""

from collections.abc import Mapping

from sead_megatron.config.checks_objective import check_objective
from sead_megatron.config.schema import ProfileConfig, TrainConfig
from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.registry import FAMILIES
from sead_megatron.objectives.sead import SeadObjective


def check_fields(config: TrainConfig) -> None:
    """Everything that two or more fields decide together. Raises UserError for the first contradiction."""
    _check_lengths(config)
    _check_evaluation(config)
    _check_curriculum(config)
    _check_optimizer(config)
    check_objective(config)
    if config.device == "cpu" and config.rollout.kv_cache_gib is None:
        raise UserError("rollout.kv_cache_gib", None, "required with device: cpu", "use for example 1.0")


def check_model_limits(config: TrainConfig, student: HFConfig, teachers: Mapping[str, HFConfig]) -> None:
    """Everything that a field and a model's config.json decide together, layouts aside. Raises UserError."""
    owners = {config.teacher.owner_of(field): teacher for field, teacher in teachers.items()}
    for name, model in {"student": student, **owners}.items():
        if config.rollout.max_model_len > model.max_position_embeddings:
            raise UserError(
                "rollout.max_model_len",
                config.rollout.max_model_len,
                f"must be at most the {name}'s max_position_embeddings ({model.max_position_embeddings})",
                "shorten it, and rollout.max_new_tokens with it",
            )
    if (reason := FAMILIES[student.architecture].engine_limit(student)) is not None:
        raise UserError(
            "student.path", config.student.path, f"vLLM cannot serve it: {reason}", "use another student"
        )
    objective = config.objective
    if not isinstance(objective, SeadObjective) or objective.teacher_entropy != "topk":
        return
    for name, teacher in owners.items():
        if objective.teacher_topk > teacher.vocab_size:
            raise UserError(
                "objective.teacher_topk",
                objective.teacher_topk,
                f"must be at most the {name}'s vocab_size ({teacher.vocab_size})",
                "use for example 64",
            )


def check_profile(profile: ProfileConfig, steps: int, world_size: int) -> None:
    """Do the profiled steps and ranks exist? Says nothing when profiling is off. Raises UserError."""
    start, stop = profile.start_step, profile.stop_step
    if not profile.enabled:
        return
    if start == 0:
        raise UserError(
            "profile.start_step",
            start,
            f"must be at least 1 with profile.stop_step {stop}: steps count from 1",
            "set it, or set both to 0 to profile nothing",
        )
    if start > steps:
        raise UserError(
            "profile.start_step", start, f"must be at most steps ({steps})", f"use for example {steps}"
        )
    if stop <= start:
        raise UserError(
            "profile.stop_step",
            stop,
            f"must be greater than profile.start_step ({start}): it is the first step that is not profiled",
            f"use {start + 1} to profile one step",
        )
    if stop > steps + 1:
        raise UserError(
            "profile.stop_step",
            stop,
            f"must be at most {steps + 1}, the step after the last (steps is {steps})",
            f"use {steps + 1}, or raise steps",
        )
    if outside := [rank for rank in profile.ranks if rank >= world_size]:
        raise UserError(
            "profile.ranks",
            profile.ranks,
            f"must be less than the world size ({world_size})",
            f"leave out {alternatives(outside, last='and')}",
        )


def _check_lengths(config: TrainConfig) -> None:
    rollout, batch = config.rollout, config.batch
    if rollout.max_model_len <= rollout.max_new_tokens:
        raise UserError(
            "rollout.max_model_len",
            rollout.max_model_len,
            f"must be greater than max_new_tokens ({rollout.max_new_tokens}): it holds the prompt too",
            "add the tokens of the longest prompt",
        )
    if batch.max_tokens_per_microbatch < rollout.max_model_len:
        raise UserError(
            "batch.max_tokens_per_microbatch",
            batch.max_tokens_per_microbatch,
            f"must be at least rollout.max_model_len ({rollout.max_model_len}): a sequence is never cut",
            f"use at least {rollout.max_model_len}",
        )


def _check_evaluation(config: TrainConfig) -> None:
    evaluation = config.evaluation
    if evaluation.every and evaluation.prompts is None and not evaluation.benchmarks:
        raise UserError(
            "evaluation.every",
            evaluation.every,
            "needs evaluation.prompts or evaluation.benchmarks",
            "set one, or use every: 0",
        )
    if evaluation.samples > 1 and evaluation.temperature == 0:
        raise UserError(
            "evaluation.samples",
            evaluation.samples,
            "needs evaluation.temperature above 0: greedy responses to a problem are all the same",
            "set it, for example to 0.6",
        )
    if config.evaluation_max_new_tokens >= config.rollout.max_model_len:
        raise UserError(
            "evaluation.max_new_tokens",
            evaluation.max_new_tokens,
            f"must be less than rollout.max_model_len ({config.rollout.max_model_len}): it holds prompts too",
            "shorten it",
        )


def _check_curriculum(config: TrainConfig) -> None:
    curriculum = config.curriculum
    if curriculum.name != "uniform" and curriculum.difficulty is None:
        raise UserError(
            "curriculum.difficulty",
            None,
            f"required with curriculum.name {curriculum.name}",
            "run tools/estimate_difficulty.py, or use name: uniform",
        )
    final = curriculum.c0 * 2**curriculum.power
    if curriculum.name == "competence" and final < 1:
        raise UserError(
            "curriculum.c0",
            curriculum.c0,
            f"times 2^power must reach 1 (it is {final:g}), or the hardest prompts are never eligible",
            f"use at least {2**-curriculum.power:g}",
        )


def _check_optimizer(config: TrainConfig) -> None:
    optimizer = config.optimizer
    if optimizer.warmup_steps >= config.steps:
        raise UserError(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"must be less than steps ({config.steps})",
            "shorten the warm-up",
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"must be at most lr ({optimizer.lr:g})",
            "lower it or raise lr",
        )
