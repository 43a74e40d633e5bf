"""Three updates with a teacher that follows the student, in several layouts: its logprobs against those of the average.

Then a checkpoint, which the next layout takes up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist
from update import config_of, fixed_rollouts

STEPS, DECAY = 3, 0.75


def teacher_logprobs(models: Any, objective: Any) -> list[float]:
    """Of the tokens of the last step's rollouts."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.training.scoring import with_teacher_columns
    from sead_megatron.training.step_plan import plan_step

    plan = plan_step(fixed_rollouts(STEPS), models.student.model.groups.layout)
    table = TokenTable.from_rollouts(plan.rollouts, "cpu")
    return with_teacher_columns(
        models, objective, plan, models.teachers.score(plan), table
    ).teacher_logprob.tolist()


def average(
    weights: list[dict[str, torch.Tensor]], initial: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The closed form, float64: ``d^n t_0 + (1 - d) sum_k d^(n - k) s_k``."""
    n = len(weights)
    return {
        name: DECAY**n * start.double()
        + (1 - DECAY) * sum(DECAY ** (n - k) * weights[k - 1][name].double() for k in range(1, n + 1))
        for name, start in initial.items()
    }


def run_case(case: dict[str, Any], student: str, teacher: str, directory: Path) -> dict[str, Any]:
    from checkpoint import model_tensors, take_step
    from safetensors.torch import load_file, save_file

    from sead_megatron.config import TrainConfig
    from sead_megatron.objectives import OBJECTIVES, build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.checkpoint import Checkpointer, find_checkpoint
    from sead_megatron.training.checkpoint_reader import load_checkpoint
    from sead_megatron.training.models import build_models

    raw = config_of(case | {"max_tokens": 128, "packing": True}, student, teacher).model_dump()
    config = TrainConfig.model_validate(raw | {"teacher": raw["teacher"] | {"ema": DECAY}})
    models = build_models(config, torch.device("cpu"))
    sampled = build_objective(OBJECTIVES["opd"][0].model_validate({"name": "opd", "form": "sampled"}), STEPS)
    if case["resumes"]:
        found = find_checkpoint(directory)
        assert found is not None and found.step == STEPS
        load_checkpoint(found, models.student, models.moving)
    else:
        objective, seen = build_objective(config.objective, STEPS), []
        for step in range(STEPS):
            take_step(models, objective, step)
            models.moving.follow()
            seen.append(model_tensors(models))
        closed = average(seen, load_file(f"{teacher}/model.safetensors"))
        if dist.get_rank() == 0:
            save_file({name: tensor.float().contiguous() for name, tensor in closed.items()}, case["average"])
        checkpoints = Checkpointer(directory, 1, models.student, models.moving)
        state: dict[str, Any] = {"step": STEPS, "skipped_steps": 0, "skipped_in_a_row": 0}
        state |= {"schedule": {}, "curriculum": {}, "objective": {}}
        checkpoints.save(STEPS, state)
        checkpoints.finish()
    dist.barrier()
    result = {
        "logprobs": teacher_logprobs(models, sampled),
        "rounded": all(
            torch.equal(t, a.to(t.dtype))
            for name, a in models.moving.averages.items()
            for t in models.moving._targets[name]
        ),
        "kept": sum(int((a != a.bfloat16().float()).sum()) for a in models.moving.averages.values()),
        "held": sum(a.numel() * 4 for a in models.moving.averages.values()),
    }
    destroy_groups()
    return result


def body(student: str, teacher: str, cases: list[dict[str, Any]], directory: str) -> list[dict[str, Any]]:
    return [run_case(case, student, teacher, Path(directory) / case["name"]) for case in cases]


if __name__ == "__main__":
    rank.run(body)
