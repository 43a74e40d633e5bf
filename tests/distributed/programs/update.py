"""Three updates on fixed rollouts in several layouts: loss, gradient norm, zones and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import rank
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import fixed_rollout

STEPS = 3


def fixed_rollouts(step: int, count: int = 12) -> list[Any]:
    """Ragged rollouts; one of them has an empty response."""
    generator = np.random.default_rng(step)
    rollouts = []
    for i in range(count):
        prompt = generator.integers(3, 250, generator.integers(2, 12)).tolist()
        response = generator.integers(3, 250, 0 if i == 5 else generator.integers(1, 40)).tolist()
        rollouts.append(fixed_rollout(prompt, response))
    return rollouts


def config_of(case: dict[str, Any], student: str, teacher: str) -> Any:
    """The run's configuration in one layout."""
    from sead_megatron.config import TrainConfig

    def layout(given: list[Any]) -> dict[str, Any]:
        return {"tensor": given[0], "pipeline": given[1], "sequence": given[2] if len(given) > 2 else False}

    return TrainConfig.model_validate(
        {
            "device": "cpu",
            "run_dir": "unused",
            "steps": STEPS,
            "student": {"path": student, "parallel": layout(case["student"])},
            "teacher": {"path": teacher, "parallel": layout(case["teacher"])},
            "precision": dict.fromkeys(("student", "teacher"), case.get("dtype", "float32")),
            "data": {"prompts": "unused", "prompts_per_step": case.get("rollouts", 12)},
            "rollout": case.get("rollout", {"max_new_tokens": 40, "max_model_len": 64, "kv_cache_gib": 0.1}),
            "objective": {
                "name": "sead",
                "student_entropy": "trainer",
                "temperature": case.get("temperature", 1.0),
            },
            "kernel": {"backend": "torch", "tile_tokens": 32, "tile_vocab": 64},
            "batch": {"max_tokens_per_microbatch": case["max_tokens"], "packing": case["packing"]},
            "optimizer": {
                "lr": 1e-2,
                "decay": "constant",
                "distributed": case.get("distributed", True),
                # Adam divides by sqrt(v): with a tiny epsilon a gradient of rounding noise moves a weight by lr.
                "eps": 1e-3,
            },
        }
    )


@contextmanager
def marking(case: dict[str, Any]) -> Iterator[None]:
    """Negative control: `"marked": False` leaves tensor-parallel parameters unmarked."""
    target = "sead_megatron.models.build._mark_tensor_parallel_parameters"
    if case.get("marked", True):
        yield
    else:
        with mock.patch(target, lambda module, weights: None):
            yield


def run_case(case: dict[str, Any], student: str, teacher: str) -> dict[str, Any]:
    """Losses, norms, zones and per-token entropies of three updates, and the exported weights after them."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.models.export import HFStream
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    config = config_of(case, student, teacher)
    with marking(case):
        models = build_models(config, torch.device("cpu"))
    objective = build_objective(config.objective, STEPS)
    result: dict[str, Any] = {
        "loss": [],
        "grad_norm": [],
        "zones": [],
        "student_entropy": [],
        "teacher_entropy": [],
        "forward_kl_max": [],
        "reverse_kl_max": [],
    }
    for step in range(STEPS):
        plan = plan_step(fixed_rollouts(step), models.student.model.groups.layout)
        scores = models.teachers.score(plan)
        table = TokenTable.from_rollouts(plan.rollouts, "cpu")
        table = table.with_columns(**models.student.token_stats(plan, scores))
        coefficients = objective.coefficients(table, step)
        update = models.student.train_step(plan, scores, coefficients)
        result["loss"].append(update.loss)
        result["grad_norm"].append(update.grad_norm)
        result["zones"].append(coefficients.zones.tolist())
        for name in ("student_entropy", "teacher_entropy"):
            result[name].append(getattr(table, name).tolist())
        for name in ("forward_kl", "reverse_kl"):
            result[f"{name}_max"].append(getattr(table, name).abs().max().item())
    weights = dict(HFStream(models.student.model, bucket_mib=1))
    destroy_groups()
    return result | {"weights": weights}


def body(
    students: dict[str, str], teacher: str, cases: list[dict[str, Any]], references: str
) -> list[dict[str, Any]]:
    """Every case, with the relative difference of its weights to the first case's of the same student.

    `students` maps the cases' "model" to a directory. Reference weights lie in the directory `references`, made by
    the first case that finds none; the difference is the largest over tensors, in norm.
    """
    results = []
    for case in cases:
        result = run_case(case, students[case["model"]], teacher)
        weights = {name: tensor.contiguous() for name, tensor in result.pop("weights").items()}
        if dist.get_rank() == 0:
            reference = Path(references) / f"{case['model']}.safetensors"
            if not reference.exists():
                save_file(weights, reference)
            wanted = load_file(reference)
            assert wanted.keys() == weights.keys()
            result["weight_difference"] = max(
                float((weights[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted
            )
        results.append(result)
        dist.barrier()
    return results


if __name__ == "__main__":
    rank.run(body)
