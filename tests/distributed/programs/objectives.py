"""One update with every objective in turn on the quick start's pair, on fixed rollouts, in several layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import rank
import torch

PAIR = "examples/quickstart"
VOCABULARY = 67
PROMPTS, SAMPLES = 4, 3


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


def run_layout(layout: dict[str, Any], names: list[str]) -> dict[str, dict[str, float]]:
    """Loss, gradient norm and active tokens of each objective's update, all from one student, one after the other."""
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
    # A small rate: the student stays where differences of rounding do not grow from one objective to the next.
    optimizer = config.model_dump()["optimizer"] | {"lr": 1e-5}
    config = TrainConfig.model_validate(
        config.model_dump() | {"reference": reference, "optimizer": optimizer}
    )
    models = build_models(config, torch.device("cpu"))
    prompts = [Prompt(str(i), [], "0", None, (3,)) for i in range(PROMPTS)]
    results = {}
    for step, name in enumerate(names):
        objective = build_objective(OBJECTIVES[name][0].model_validate({"name": name}), 4)
        rollouts = rollouts_of(step)
        plan = plan_step(rollouts, models.student.model.groups.layout, models.teacher.layout)
        scores = models.teacher.score(plan)
        passed = [i % 4 != 1 for i in range(len(rollouts))]
        facts = rollout_facts(
            rollouts, passed, prompts, [0.25, 0.5, 0.5, 0.875], samples_per_prompt=SAMPLES, longest=24
        )
        table = TokenTable.from_rollouts(rollouts, "cpu", facts)
        table = with_teacher_columns(models, objective, plan, scores, table)
        table = with_reference_column(models, plan, table)
        if objective.needs_token_stats(0):
            columns = models.student.token_stats(plan, scores, objective.topk_lists)
            table = table.with_columns(**columns)
        coefficients = objective.coefficients(table, 0)
        update = models.student.train_step(plan, scores, coefficients)
        results[name] = {
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "active": coefficients.metrics["tokens/active"],
        }
    destroy_groups()
    return results


def body(layouts: list[dict[str, Any]], names: list[str]) -> list[dict[str, dict[str, float]]]:
    return [run_layout(layout, names) for layout in layouts]


if __name__ == "__main__":
    rank.run(body)
