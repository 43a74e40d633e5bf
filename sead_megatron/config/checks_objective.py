"""Has the objective what it needs, and are its rollouts drawn from the distribution that its loss assumes?"""

from sead_megatron.config.checks_teacher import check_domains, check_lists, check_needed
from sead_megatron.config.schema import TrainConfig
from sead_megatron.data.prompts import PromptRecord
from sead_megatron.errors import UserError
from sead_megatron.objectives import ObjectiveSection


def check_objective(config: TrainConfig) -> None:
    """Fields only. Raises UserError."""
    objective = config.objective
    _check_sampling(config)
    if config.rollout.samples_per_prompt < objective.min_samples_per_prompt:
        raise UserError(
            "rollout.samples_per_prompt",
            config.rollout.samples_per_prompt,
            f"objective {objective.name} compares rollouts of one prompt: at least "
            f"{objective.min_samples_per_prompt}",
            "use for example 8",
        )
    if objective.needs_difficulty and config.curriculum.difficulty is None:
        raise UserError(
            "curriculum.difficulty",
            None,
            f"required with objective {objective.name}: it weighs prompts by their pass rate",
            "estimate difficulties",
        )
    if objective.needs_reference and config.reference is None:
        raise UserError(
            "reference", None, f"required with this objective {objective.name}", "add it, with reference.path"
        )
    if config.reference is not None and not objective.needs_reference:
        raise UserError(
            "reference.path",
            config.reference.path,
            f"objective {objective.name} as it is set reads no reference model",
            "remove the section",
        )
    check_needed(config)
    _check_context(config)
    _check_cache(config)
    check_lists(config)
    objective.check(config)


def _check_sampling(config: TrainConfig) -> None:
    """A gradient through sampled tokens is biased when they are drawn from another distribution."""
    objective, rollout = config.objective, config.rollout
    if not objective.follows_sampled_tokens or objective.corrects_sampling:
        return
    because = f"objective {objective.name} follows sampled tokens"
    if rollout.temperature != objective.temperature:
        raise UserError(
            "rollout.temperature",
            rollout.temperature,
            f"{because}: must be objective.temperature ({objective.temperature:g}), or its gradient is biased",
            f"use {objective.temperature:g}{_or_weigh(objective, ', for example 5.0')}",
        )
    for name, value, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value != off:
            raise UserError(
                f"rollout.{name}",
                value,
                f"{because}: tokens that are never drawn bias its gradient",
                f"use {off:g}{_or_weigh(objective)}",
            )


def _or_weigh(objective: ObjectiveSection, example: str = "") -> str:
    has_weights = "importance_clip" in type(objective).model_fields
    return f", or set objective.importance_clip{example}" if has_weights else ""


def _check_context(config: TrainConfig) -> None:
    context, objective = config.teacher.context, config.objective
    if objective.needs_solutions and context is None:
        raise UserError(
            "teacher.context",
            None,
            f"required with objective {objective.name}: its teacher reads a gold solution",
            'use for example "{problem}\\n\\nA correct solution:\\n{solution}"',
        )
    if context is None:
        return
    for field in ("{problem}", "{solution}"):
        if field not in context:
            raise UserError("teacher.context", context, f"must hold {field}", "add it")


def _check_cache(config: TrainConfig) -> None:
    objective = config.objective
    if objective.reads_cache and config.data.cache is None:
        raise UserError(
            "data.cache",
            None,
            f"required with objective {objective.name}: it trains on responses that were sampled and scored before",
            "name a directory, and fill it with `python -m sead_megatron cache CONFIG`",
        )
    if config.data.cache is not None and not objective.reads_cache:
        raise UserError(
            "data.cache",
            config.data.cache,
            f"objective {objective.name} samples its responses and reads no cache",
            "remove it, or use objective lightning",
        )


def check_prompts_for(config: TrainConfig, prompts: list[PromptRecord]) -> None:
    """Do the training prompts have what the objective reads? Raises UserError naming how many do not."""
    wanted = []
    if config.objective.needs_rewards:
        wanted.append(("answer", "answer", f"objective {config.objective.name} rewards right answers"))
    if config.objective.own_batches < 1:
        name = config.objective.name
        reason = f"objective {name} trains on it, or on turns, where student_share is below 1"
        wanted.append(("solution", "fixed_response", reason))
    if config.teacher.context is not None:
        wanted.append(("solution", "solution", "teacher.context shows it to the teacher"))
    for key, attribute, reason in wanted:
        without = [prompt.id for prompt in prompts if not getattr(prompt, attribute)]
        if without:
            raise UserError(
                f"data.prompts: {key}",
                None,
                f"missing in {len(without)} of {len(prompts)} prompts, the first {without[0]!r}; {reason}",
                "add it or remove these prompts",
            )
    if config.objective.needs_teacher:
        check_domains(config, prompts)
