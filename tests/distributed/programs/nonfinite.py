"""Steps in which one rank's loss is NaN."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import rank
import torch
import torch.distributed as dist
from update import config_of, fixed_rollouts


def poisoned(scores: Any, victim: int, field: str) -> Any:
    """Scores whose first hidden state, or whose output layer's first weight, is NaN on one rank."""
    if dist.get_rank() == victim:
        assert scores is not None, "the victim computes no loss"
        (part,) = scores.parts
        values = getattr(part, field).clone()
        values[0, 0] = float("nan")
        scores = dataclasses.replace(scores, parts=[dataclasses.replace(part, **{field: values})])
    return scores


def first_prompt(plan: Any, scores: Any, victim: int) -> str:
    """The prompt of the victim's first response token, on every rank."""
    found = [""]
    if dist.get_rank() == victim:
        token = int(scores.parts[0].token_index[0])
        rollout = next(i for i, end in enumerate(plan.offsets[1:].tolist()) if token < end)
        found = [f"p{rollout}"]
    dist.broadcast_object_list(found, src=victim)
    return found[0]


def state_of(student: Any) -> list[torch.Tensor]:
    """Copies of this rank's parameters and of its optimizer's state."""
    optimizers = getattr(student.optimizer.megatron, "chained_optimizers", [student.optimizer.megatron])
    moments = [v for o in optimizers for state in o.optimizer.state.values() for v in state.values()]
    return [t.detach().clone() for t in (*student.model.module.parameters(), *moments)]


def everywhere(flag: bool) -> bool:
    """Whether `flag` is true on every rank."""
    count = torch.tensor(float(flag))
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return bool(count)


def run_steps(
    case: dict[str, Any], student_path: str, teacher_path: str, poison: list[int]
) -> dict[str, Any]:
    """Steps 0, 1, 2 on the same rollouts with one objective; those in `poison` have a NaN on rank case["victim"]."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.train import Trainer
    from sead_megatron.training.models import build_models
    from sead_megatron.training.nonfinite import FrozenModels
    from sead_megatron.training.step_plan import plan_step

    config = config_of({"max_tokens": 128, "packing": True} | case, student_path, teacher_path)
    config = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"max_skipped_steps": 1})}
    )
    models = build_models(config, torch.device("cpu"))
    student = models.student
    trainer = Trainer(SimpleNamespace(config=config, rank=dist.get_rank()), None, None, None)  # type: ignore[arg-type]
    rollouts = [dataclasses.replace(r, prompt_index=i) for i, r in enumerate(fixed_rollouts(0))]
    plan = plan_step(rollouts, student.model.groups.layout)
    frozen = FrozenModels.of(config, [SimpleNamespace(id=f"p{i}") for i in range(len(rollouts))])  # type: ignore[misc]
    field = case.get("poisoned", "hidden")
    scores = models.teachers.score(plan)
    table = TokenTable.from_rollouts(plan.rollouts, "cpu").with_columns(**student.token_stats(plan, scores))
    coefficients = build_objective(config.objective, 3).coefficients(table, 0)
    # Every token takes part, so that the poisoned one does.
    coefficients = dataclasses.replace(coefficients, weights=coefficients.weights.clone().fill_(0.25))
    result: dict[str, Any] = {"applied": [], "unchanged": [], "counted": [], "loss": [], "error": ""}
    result |= {"blame": [], "first": first_prompt(plan, scores, case["victim"]), "tokens": plan.num_tokens}
    engine_table = TokenTable.from_rollouts(plan.rollouts, "cpu")
    for step in range(3):
        before = state_of(student)
        given = poisoned(scores, case["victim"], field) if step in poison else scores
        blame = frozen.blame_for_scores(plan, given, engine_table, student.device)
        update = student.train_step(plan, given, coefficients)
        same = len(before) == len(state_of(student)) and all(map(torch.equal, before, state_of(student)))
        result["applied"].append([everywhere(update.applied), everywhere(not update.applied)])
        result["unchanged"].append(everywhere(same))
        result["loss"].append(update.loss)
        if blame is None and not update.applied:
            blame = frozen.blame_for_columns(plan, update.columns)
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if blame is None else blame.message)
        assert len(set(messages)) == 1, messages
        result["blame"].append(messages[0])
        try:
            trainer.count_skipped(update, blame)
        except RuntimeError as error:
            result["error"] = str(error)
        result["counted"].append(trainer.skipped_steps)
    destroy_groups()
    return result


def body(student: str, teacher: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case's run without a NaN, with one in step 1, and with one in steps 1 and 2."""
    results = []
    for case in cases:
        runs = {"never": [], "once": [1], "twice": [1, 2]}
        results.append({name: run_steps(case, student, teacher, poison) for name, poison in runs.items()})
    return results


if __name__ == "__main__":
    from sead_megatron.rollout.environment import prepare_environment

    prepare_environment(on_cpu=True)
    rank.run(body)
