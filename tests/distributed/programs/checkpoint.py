"""Saves after one step in one layout, or loads in several and takes the next step."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import rank
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from update import config_of, fixed_rollouts

Tensors = dict[str, torch.Tensor]


def owned_parts(megatron: Any) -> Iterator[tuple[torch.Tensor, int, int, torch.Tensor, Any]]:
    """For each parameter: itself, the range of its flat elements that this rank's optimizer owns, master, moments."""
    for optimizer in getattr(megatron, "chained_optimizers", [megatron]):
        groups = []
        if hasattr(optimizer, "shard_fp32_groups"):
            groups = [
                *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
                *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
            ]
        elif hasattr(optimizer, "float16_groups"):
            groups = [*zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)]
        else:
            groups = [(group["params"],) * 2 for group in optimizer.optimizer.param_groups]
        for parameter, master in itertools.chain(*(zip(*pair, strict=True) for pair in groups)):
            start, end = 0, parameter.numel()
            if hasattr(optimizer, "shard_fp32_groups"):
                owned = optimizer._get_model_param_range_map(parameter)["param"]
                start, end = owned.start, owned.end
            yield parameter, start, end, master, optimizer.optimizer.state[master]


def optimizer_tensors(student: Any) -> Tensors:
    """Float32 masters and Adam's moments of every parameter, merged to full Hugging Face tensors on every rank."""
    from sead_megatron.models.export import HFStream

    model = student.model
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    full = {
        kind: {name: torch.zeros_like(p, dtype=torch.float32) for p, name in names.items()} for kind in kinds
    }
    for parameter, start, end, master, state in owned_parts(student.optimizer.megatron):
        for kind in kinds:
            values = master if kind == "master" else state[kind]
            full[kind][names[parameter]].view(-1)[start:end] = values.detach().flatten()
    merged: Tensors = {}
    for kind in kinds:
        if student.ddp.ddp_config.use_distributed_optimizer:
            for values in full[kind].values():
                dist.all_reduce(values, group=model.groups.collection.dp)
        parameters = {name: torch.nn.Parameter(values) for name, values in full[kind].items()}
        shim = SimpleNamespace(
            named_parameters=parameters.items, parameters=lambda p=parameters: iter(p.values())
        )
        stream = HFStream(dataclasses.replace(model, module=shim), 1)
        merged |= {f"{kind} {name}": tensor.clone() for name, tensor in stream}
    return merged


def take_step(models: Any, objective: Any, step: int) -> dict[str, float]:
    """One update on the fixed rollouts of a step."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.training.step_plan import plan_step

    student, teachers = models.student, models.teachers
    plan = plan_step(fixed_rollouts(step), student.model.groups.layout)
    scores = teachers.score(plan)
    table = TokenTable.from_rollouts(plan.rollouts, "cpu").with_columns(**student.token_stats(plan, scores))
    update = student.train_step(plan, scores, objective.coefficients(table, step))
    assert update.applied
    return {"loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr}


def model_tensors(models: Any) -> Tensors:
    """The student's Hugging Face tensors."""
    from sead_megatron.models.export import HFStream

    return {name: tensor.clone() for name, tensor in HFStream(models.student.model, 1)}


def late_write(event: threading.Event) -> Callable[[Any], Any]:
    """`ShareWriter.write` on a disk that does nothing until an event."""
    from sead_megatron.training.checkpoint_writer import ShareWriter

    write = ShareWriter.write

    def late(writer: Any) -> Any:
        assert event.wait(300)
        return write(writer)

    return late


def save(case: dict[str, Any], models: Any, objective: Any, directory: Path) -> dict[str, Any]:
    """Step 0, checkpoint and what it must restore, step 1. No file is written before that step is done."""
    from sead_megatron.training.checkpoint import Checkpointer
    from sead_megatron.training.checkpoint_files import checkpoint_path
    from sead_megatron.training.checkpoint_writer import ShareWriter

    take_step(models, objective, 0)
    state: dict[str, Any] = {"step": 1, "skipped_steps": 0, "skipped_in_a_row": 0}
    state |= {"schedule": models.student.optimizer.state_dict(), "curriculum": {}, "objective": {}}
    checkpoints = Checkpointer(directory, 1, models.student)
    stepped = threading.Event()
    with mock.patch.object(ShareWriter, "write", late_write(stepped)):
        checkpoints.save(1, state)
    optimizer = optimizer_tensors(models.student)
    result = take_step(models, objective, 1)
    weights = model_tensors(models)
    checkpoints.poll()
    assert checkpoints.is_busy and not checkpoint_path(directory, 1).exists()
    stepped.set()
    checkpoints.finish()
    if dist.get_rank() == 0:
        save_file(optimizer, directory / "optimizer.safetensors")
        save_file(weights, directory / "weights.safetensors")
    return result


def load(case: dict[str, Any], models: Any, objective: Any, directory: Path) -> dict[str, Any]:
    """Restores step 0's checkpoint and takes step 1; differences to the uninterrupted run."""
    from sead_megatron.training.checkpoint import find_checkpoint
    from sead_megatron.training.checkpoint_files import check_checkpoint
    from sead_megatron.training.checkpoint_reader import load_checkpoint

    student = models.student
    found = find_checkpoint(directory)
    assert found is not None and found.step == 1
    check_checkpoint(found.path)
    load_checkpoint(found, student)
    student.optimizer.load_state_dict(found.state["schedule"])
    wanted, restored = load_file(directory / "optimizer.safetensors"), optimizer_tensors(student)
    assert wanted.keys() == restored.keys()
    unequal = [name for name in wanted if not torch.equal(wanted[name], restored[name])]
    rounded = sum(
        int((t != t.bfloat16().float()).sum()) for n, t in restored.items() if n.startswith("master")
    )
    result: dict[str, Any] = {
        "unequal": unequal,
        "below_bfloat16": rounded,
        **take_step(models, objective, 1),
    }
    weights, after = load_file(directory / "weights.safetensors"), model_tensors(models)
    result["weight_difference"] = max(
        float((weights[n].double() - after[n].double()).norm() / weights[n].double().norm()) for n in weights
    )
    return result


def body(student: str, teacher: str, cases: list[dict[str, Any]], directory: str) -> list[dict[str, Any]]:
    """Saves or loads (case["do"]) each case's checkpoint, which lies in the folder case["name"]."""
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.models import build_models

    results = []
    for case in cases:
        config = config_of({"max_tokens": 128, "packing": True} | case, student, teacher)
        models = build_models(config, torch.device("cpu"))
        run = {"save": save, "load": load}[case["do"]]
        results.append(
            run(case, models, build_objective(config.objective, config.steps), Path(directory) / case["name"])
        )
        destroy_groups()
        dist.barrier()
    return results


if __name__ == "__main__":
    rank.run(body)
