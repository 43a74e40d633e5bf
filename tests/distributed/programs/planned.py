"""What a rank really holds of both models, and the peak of each phase of a step, for `sead_megatron.plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import rank
import torch
import torch.distributed as dist
from tiny_models import fixed_rollout
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import profile
from update import config_of


def body(student: str, teacher: str, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each case the reports of all ranks."""
    reports = []
    for case in cases:
        mine = run_case(case, student, teacher)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        reports.append(ranks)
    return reports


def run_case(case: dict[str, Any], student: str, teacher: str) -> dict[str, Any]:
    from sead_megatron.data.types import TokenTable
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.checkpoint_shards import ModelShards, bytes_of
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    config = config_of(case, case.get("path", student), teacher)
    config = config.model_copy(
        update={"student": config.student.model_copy(update={"recompute": case.get("recompute", "none")})}
    )
    models = build_models(config, torch.device("cpu"))
    objective = build_objective(config.objective, 3)
    rollouts = [
        fixed_rollout([7 + i] * case["prompt"], [9 + i] * case["response"]) for i in range(case["rollouts"])
    ]
    plan = plan_step(rollouts, models.student.model.groups.layout)
    report: dict[str, Any] = {}
    # The first update makes the optimizer's moments; the second one is measured, with all of them there.
    for step in range(2):
        scores, report["score"] = peak(partial(models.teachers.score, plan))
        table = TokenTable.from_rollouts(rollouts, "cpu")
        columns = {"teacher_entropy": torch.rand(table.num_tokens)}
        if config.objective.student_entropy == "trainer":
            columns["student_entropy"] = torch.rand(table.num_tokens)
        coefficients = objective.coefficients(table.with_columns(**columns), step)
        update = partial(models.student.train_step, plan, scores, coefficients)
        _, report["update"] = peak(update)
        report["hidden"] = 0 if scores is None else storage(part.hidden for part in scores.parts)
    report |= held(models) | {"checkpoint": bytes_of(ModelShards(models.student, None).share(moments=True))}
    destroy_groups()
    return report


def held(models: Any) -> dict[str, int]:
    """Bytes of the tensors that live for the whole run."""
    student, teachers = models.student, models.teachers.members
    optimizer = student.optimizer.megatron
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    states = [value for state in inner.state.values() for value in state.values()]
    parameters = {p.untyped_storage().data_ptr() for p in student.model.module.parameters()}
    masters = [p for group in inner.param_groups for p in group["params"]]
    return {
        "parameters": storage(student.model.module.parameters()),
        "gradients": storage(buffer.grad_data for buffer in student.ddp.buffers),
        "masters": storage(p for p in masters if p.untyped_storage().data_ptr() not in parameters),
        "moments": storage(t for t in states if isinstance(t, Tensor) and t.numel() > 1),
        "teacher": sum(storage(teacher._model.module.parameters()) for teacher in teachers),
        "teacher_output": sum(storage([t.output]) for t in teachers if t.output is not None),
    }


def storage(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, each piece counted once."""
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and by how much the memory that torch has allocated rose above what it was before."""
    with profile(profile_memory=True) as recorded:
        result = call()
    live: dict[int, int] = {}
    now = highest = 0
    for _, address, change in sorted(allocations(recorded.profiler.kineto_results.experimental_event_tree())):
        # What a thread of gloo freed is not recorded; it shows when its address is handed out again.
        now += change - (live.pop(address, 0) if change > 0 else 0)
        if change > 0:
            live[address] = change
        else:
            live.pop(address, None)
        highest = max(highest, now)
    return result, highest


def allocations(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, change in bytes) of every allocation and release below the given events."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from allocations(node.children)


if __name__ == "__main__":
    rank.run(body)
