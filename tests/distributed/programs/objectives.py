"""One update with every objective in turn on fixed rollouts, in several layouts: the quick start's pair, and a second
teacher for one of the domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import rank
import torch

PAIR = "examples/quickstart"
VOCABULARY = 67
PROMPTS, SAMPLES = 4, 3
# In every third step no prompt is the second teacher's.
DOMAINS = ["math", "code", None, "math"], ["math", "code", None, "math"], ["math", None, None, "math"]


def rollouts_of(step: int) -> list[Any]:
    """Ragged rollouts, three of each prompt, one of them empty; the teacher reads longer prompts."""
    from sead_megatron.data.types import Rollout

    generator = np.random.default_rng([7, step])
    rollouts = []
    for i in range(PROMPTS * SAMPLES):
        length = 0 if i == 5 else int(generator.integers(1, 24))
        logprobs = -generator.exponential(0.5, length).astype(np.float32)
        rollouts.append(
            Rollout(
                prompt_index=i // SAMPLES,
                prompt_ids=generator.integers(3, VOCABULARY, 6).astype(np.int32),
                response_ids=generator.integers(3, VOCABULARY, length).astype(np.int32),
                logprobs=logprobs,
                entropies=generator.exponential(0.3, length).astype(np.float32),
                finished=True,
                weight_version=step,
                sampling_logprobs=logprobs * np.float32(1.2),
                teacher_prompt_ids=generator.integers(3, VOCABULARY, 9).astype(np.int32),
            )
        )
    return rollouts


def run_layout(layout: dict[str, Any], names: list[str], second: str | None) -> dict[str, dict[str, Any]]:
    """Loss, gradient norm and active tokens of each objective's update, all from one student, one after the other.

    Where an objective reads it, the teacher's logprob of every token too. `second`: the second teacher; None for no
    teacher at all.
    """
    from update import config_of

    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Prompt, TokenTable
    from sead_megatron.objectives import OBJECTIVES, build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.facts import rollout_facts
    from sead_megatron.training.models import build_models
    from sead_megatron.training.scoring import with_reference_column, with_teacher_columns
    from sead_megatron.training.step_plan import plan_step

    case = layout | {"model": "student", "max_tokens": 64, "packing": True}
    config = config_of(case, f"{PAIR}/student", f"{PAIR}/teacher")
    reference = {"path": f"{PAIR}/student", "parallel": {"tensor": 2}}
    raw = config.model_dump()
    # A small rate: the student stays where differences of rounding do not grow from one objective to the next.
    optimizer = raw["optimizer"] | {"lr": 1e-5}
    teacher = {} if second is None else raw["teacher"] | {"domains": {"code": second}}
    config = TrainConfig.model_validate(
        raw | {"reference": reference, "optimizer": optimizer, "teacher": teacher}
    )
    models = build_models(config, torch.device("cpu"))
    cached = [name for name in names if OBJECTIVES[name][0].reads_cache]
    online = online_update(models, config) if cached else None
    results = {}
    for step, name in enumerate(names):
        if name in cached:
            continue
        objective = build_objective(OBJECTIVES[name][0].model_validate({"name": name}), 4)
        rollouts = rollouts_of(step)
        prompts = [Prompt(str(i), [], "0", domain, (3,)) for i, domain in enumerate(DOMAINS[step % 3])]
        teacher_of = [
            config.teacher.index_of(prompts[r.prompt_index].domain) if second else 0 for r in rollouts
        ]
        plan = plan_step(rollouts, models.student.model.groups.layout, teacher_of)
        scores = models.teachers.score(plan)
        passed = [i % 4 != 1 for i in range(len(rollouts))]
        facts = rollout_facts(
            rollouts, passed, prompts, [0.25, 0.5, 0.5, 0.875], samples_per_prompt=SAMPLES, longest=24
        )
        table = TokenTable.from_rollouts(rollouts, "cpu", facts)
        table = with_teacher_columns(models, objective, plan, scores, table)
        table = with_reference_column(models, plan, table)
        if objective.needs_token_stats(0) or second is None:
            columns = models.student.token_stats(
                plan, scores, objective.topk_lists, teacher_argmax=objective.teacher_argmax
            )
            table = table.with_columns(**columns)
        coefficients = objective.coefficients(table, 0)
        update = models.student.train_step(plan, scores, coefficients)
        results[name] = {
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "active": coefficients.metrics["tokens/active"],
            "columns": sorted(name for name in table.column_names() if getattr(table, name) is not None),
            "teacher_logprob": None if table.teacher_logprob is None else table.teacher_logprob.tolist(),
            "reference_logprob": table.require("reference_logprob").tolist(),
        }
    destroy_groups()
    for name in cached:
        objective = build_objective(OBJECTIVES[name][0].model_validate({"name": name}), 4)
        assert online is not None
        results[name] = cached_update(config, objective, *online)
        destroy_groups()
    return results


def online_update(models: Any, config: Any) -> tuple[Any, dict[str, float]]:
    """The teacher's logprobs of the first rollouts, and what sampled OPD's update on them is from the first weights."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.objectives.opd import Opd, OpdObjective
    from sead_megatron.training.scoring import with_teacher_columns
    from sead_megatron.training.step_plan import plan_step

    objective, rollouts = Opd(OpdObjective(form="sampled"), 4), rollouts_of(0)
    teacher_of = [config.teacher.index_of(DOMAINS[0][rollout.prompt_index]) for rollout in rollouts]
    plan = plan_step(rollouts, models.student.model.groups.layout, teacher_of)
    scores = models.teachers.score(plan)
    table = TokenTable.from_rollouts(rollouts, "cpu")
    table = with_teacher_columns(models, objective, plan, scores, table)
    logprobs = table.require("teacher_logprob")
    measured = table.with_columns(**models.student.token_stats(plan, scores))
    update = models.student.train_step(plan, scores, objective.coefficients(measured, 0))
    return logprobs.numpy(), {"online_loss": update.loss, "online_grad_norm": update.grad_norm}


def cached_update(config: Any, objective: Any, logprobs: Any, online: dict[str, float]) -> dict[str, float]:
    """The same update without a teacher, on its cached logprobs."""
    from dataclasses import replace

    from sead_megatron.data.types import TokenTable
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    alone = config.model_copy(update={"objective": objective.config, "reference": None})
    models = build_models(alone, torch.device("cpu"))
    assert not models.teachers.members
    offsets = np.cumsum([0, *(len(rollout.response_ids) for rollout in rollouts_of(0))])
    rollouts = [
        replace(rollout, teacher_logprobs=logprobs[offsets[i] : offsets[i + 1]], teacher_prompt_ids=None)
        for i, rollout in enumerate(rollouts_of(0))
    ]
    plan = plan_step(rollouts, models.student.model.groups.layout, [0] * len(rollouts))
    table = TokenTable.from_rollouts(rollouts, "cpu")
    table = table.with_columns(**models.student.token_stats(plan, None))
    coefficients = objective.coefficients(table, 0)
    refused = 0.0
    try:
        weights = torch.ones_like(coefficients.weights)
        models.student.train_step(plan, None, replace(coefficients, weights=weights))
    except ValueError:
        refused = 1.0
    update = models.student.train_step(plan, None, coefficients)
    active = coefficients.metrics["tokens/active"]
    return {"loss": update.loss, "grad_norm": update.grad_norm, "active": active, "refused": refused} | online


def body(
    layouts: list[dict[str, Any]], names: list[str], second: str | None
) -> list[dict[str, dict[str, Any]]]:
    return [run_layout(layout, names, second) for layout in layouts]


if __name__ == "__main__":
    rank.run(body)
