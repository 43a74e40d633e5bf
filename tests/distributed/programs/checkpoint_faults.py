"""What a run meets while it writes checkpoints: skipped steps, a full disk, ranks that see different directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist
from checkpoint import model_tensors, optimizer_tensors, take_step
from nonfinite import poisoned
from update import config_of, fixed_rollouts

STATE: dict[str, Any] = {"schedule": {}, "curriculum": {}, "objective": {}}
STATE |= {"skipped_steps": 0, "skipped_in_a_row": 0}


def skip_step(models: Any, objective: Any) -> None:
    """An update with a NaN on rank 0, which no rank applies."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.training.step_plan import plan_step

    plan = plan_step(fixed_rollouts(0), models.student.model.groups.layout)
    scores = models.teachers.score(plan)
    table = TokenTable.from_rollouts(plan.rollouts, "cpu")
    table = table.with_columns(**models.student.token_stats(plan, scores))
    coefficients = objective.coefficients(table, 0)
    coefficients.weights.fill_(0.25)
    assert not models.student.train_step(plan, poisoned(scores, 0, "hidden"), coefficients).applied


def build(case: dict[str, Any], student: str, teacher: str) -> tuple[Any, Any]:
    from sead_megatron.objectives import build_objective
    from sead_megatron.training.models import build_models

    config = config_of({"max_tokens": 128, "packing": True} | case, student, teacher)
    return build_models(config, torch.device("cpu")), build_objective(config.objective, config.steps)


def skipped_first_step(case: dict[str, Any], student: str, teacher: str, directory: Path) -> dict[str, Any]:
    """A checkpoint after a skipped first step: how the next two steps differ with a resume from it and without."""
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.checkpoint import Checkpointer, find_checkpoint
    from sead_megatron.training.checkpoint_reader import load_checkpoint

    outcomes = []
    for resumes in (False, True):
        models, objective = build(case, student, teacher)
        if resumes:
            found = find_checkpoint(directory)
            assert found is not None and found.state["optimizer_updates"] == 0
            load_checkpoint(found, models.student)
            models.student.optimizer.load_state_dict(found.state["schedule"])
        else:
            skip_step(models, objective)
            checkpoints = Checkpointer(directory, 1, models.student)
            checkpoints.save(1, STATE | {"step": 1, "schedule": models.student.optimizer.state_dict()})
            checkpoints.finish()
        numbers = [take_step(models, objective, step) for step in (1, 2)]
        outcomes.append((numbers, model_tensors(models) | optimizer_tensors(models.student)))
        destroy_groups()
        dist.barrier()
    (numbers, tensors), (again, restored) = outcomes
    unequal = [name for name in tensors if not torch.equal(tensors[name], restored[name])]
    return {"numbers": [numbers, again], "unequal": unequal, "tensors": len(tensors)}


def full_disk(case: dict[str, Any], student: str, teacher: str, directory: Path) -> dict[str, Any]:
    """Rank 1 cannot write its second checkpoint: what each rank hears, and which checkpoint is found afterwards."""
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.checkpoint import Checkpointer, find_checkpoint
    from sead_megatron.training.checkpoint_files import partial_path

    models, objective = build(case, student, teacher)
    take_step(models, objective, 0)
    checkpoints = Checkpointer(directory, 3, models.student)
    checkpoints.save(1, STATE | {"step": 1})
    checkpoints.finish()
    dist.barrier()
    bytes_written = (directory / "step_00000001" / f"__{dist.get_rank()}_0.distcp").stat().st_size
    if dist.get_rank() == 1:
        partial = partial_path(directory, 2)
        partial.mkdir(exist_ok=True)
        (partial / "__1_0.distcp").symlink_to("/dev/full")
    dist.barrier()
    take_step(models, objective, 1)
    checkpoints.save(2, STATE | {"step": 2})
    write = checkpoints._write
    assert write is not None
    write.files._thread.join()
    heard = ""
    if dist.get_rank() == 1:
        try:
            checkpoints.poll()
        except Exception as error:
            heard = f"{type(error).__name__}: {error} {' '.join(error.__notes__)}"
    found = find_checkpoint(directory)
    destroy_groups()
    told: list[Any] = [None, None]
    dist.all_gather_object(told, (heard, bytes_written, None if found is None else found.step))
    return {"heard": [t[0] for t in told], "bytes": [t[1] for t in told], "found": [t[2] for t in told]}


def different_views(directory: Path) -> list[int | None]:
    """The step that each rank finds, where rank 1's directory shows an older checkpoint or none."""
    from sead_megatron.training.checkpoint import find_checkpoint

    found = []
    (directory / "older" / "step_00000000").mkdir(parents=True, exist_ok=True)
    (directory / "empty").mkdir(exist_ok=True)
    for late in ("older", "empty"):
        newest = find_checkpoint(directory if dist.get_rank() == 0 else directory / late)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, None if newest is None else newest.step)
        found += told
    return found


def body(student: str, teacher: str, cases: list[dict[str, Any]], directory: str) -> list[dict[str, Any]]:
    """Each case in a folder of its own."""
    results = []
    for number, case in enumerate(cases):
        folder = Path(directory) / str(number)
        result = skipped_first_step(case, student, teacher, folder / "skipped")
        result |= full_disk(case, student, teacher, folder / "full")
        results.append(result | {"views": different_views(folder / "full")})
    return results


if __name__ == "__main__":
    rank.run(body)
