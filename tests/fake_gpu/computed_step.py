"""Updates of a tiny pair on fixed rollouts, on the CPU or on fake GPUs that compute; every number goes to a file.

    python -m torch.distributed.run --nproc-per-node RANKS tests/fake_gpu/computed_step.py ARGUMENTS.json REPORT.json

Both sides run this program, in one Python environment, so that whatever differs comes from the device.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Tensors = dict[str, torch.Tensor]


def hide_transformer_engine() -> None:
    """Its kernels are no ATen operators: they would compute nothing."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def join_world(kind: Literal["cpu", "cuda"]) -> torch.device:
    """The process group, and the CPU's redirections there.

    As `sead_megatron.training.job.init_world`, whose module imports vLLM: half a minute a rank.
    """
    if kind == "cpu":
        from sead_megatron.parallel import megatron_on_cpu

        dist.init_process_group("gloo")
        megatron_on_cpu.install()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


class Recorder:
    """Numbers of a run under stable names, on the host."""

    def __init__(self) -> None:
        self.numbers: Tensors = {}

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """`value` may be on any device."""
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        self.numbers[name] = tensor.detach().to("cpu", copy=True)

    def add_all(self, prefix: str, values: Any) -> None:
        """Every item of a mapping or of an iterable of pairs."""
        for name, value in dict(values).items():
            self.add(f"{prefix}/{name}", value)


def one_step(
    models: Any, objective: Any, step: int, device: torch.device, record: Recorder, prefix: str
) -> None:
    """Teacher's scores, statistics of every token, coefficients and update of a step, and the weights afterwards."""
    from update import fixed_rollouts

    from sead_megatron.data.types import TokenTable
    from sead_megatron.models.export import HFStream
    from sead_megatron.training.step_plan import plan_step

    student = models.student
    plan = plan_step(fixed_rollouts(step), student.model.groups.layout)
    scores = models.teachers.score(plan)
    table = TokenTable.from_rollouts(plan.rollouts, device)
    table = table.with_columns(**student.token_stats(plan, scores))
    coefficients = objective.coefficients(table, step)
    update = student.train_step(plan, scores, coefficients)
    assert update.applied
    for name in ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
        record.add(f"{prefix}/{name}", getattr(table, name))
    record.add(f"{prefix}/zones", coefficients.zones)
    record.add(f"{prefix}/loss", update.loss)
    record.add(f"{prefix}/grad_norm", update.grad_norm)
    record.add_all(f"{prefix}/update", update.columns)
    record.add_all(f"{prefix}/weights", HFStream(student.model, bucket_mib=1))


def save(models: Any, directory: Path) -> None:
    """A checkpoint after the first step (a collective)."""
    from sead_megatron.training.checkpoint import Checkpointer

    state: dict[str, Any] = {"step": 1, "skipped_steps": 0, "skipped_in_a_row": 0}
    state |= {"schedule": models.student.optimizer.state_dict(), "curriculum": {}, "objective": {}}
    checkpoints = Checkpointer(directory, 1, models.student)
    checkpoints.save(1, state)
    checkpoints.finish()
    dist.barrier()


def load(models: Any, directory: Path) -> None:
    """Restores it."""
    from sead_megatron.training.checkpoint import find_checkpoint
    from sead_megatron.training.checkpoint_reader import load_checkpoint

    found = find_checkpoint(directory)
    assert found is not None
    load_checkpoint(found, models.student)
    models.student.optimizer.load_state_dict(found.state["schedule"])


def run_case(case: dict[str, Any], device: torch.device, directory: Path) -> Tensors:
    """Two updates with a checkpoint between them, then the second one again from the checkpoint."""
    from checkpoint import optimizer_tensors
    from update import config_of

    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.models import build_models

    record = Recorder()
    config = config_of(case, case["student_path"], case["teacher_path"])
    # The CPU's side of a case is always plain torch.
    backend = case.get("backend", "torch") if device.type == "cuda" else "torch"
    kernel = config.kernel.model_copy(update={"backend": backend})
    config = config.model_copy(update={"device": device.type, "kernel": kernel})
    models = build_models(config, device)
    objective = build_objective(config.objective, config.steps)
    one_step(models, objective, 0, device, record, "first")
    save(models, directory)
    record.add_all("optimizer", optimizer_tensors(models.student))
    one_step(models, objective, 1, device, record, "second")
    destroy_groups()

    models = build_models(config, device)
    load(models, directory)
    one_step(models, build_objective(config.objective, config.steps), 1, device, record, "resumed")
    destroy_groups()
    return record.numbers


def main() -> None:
    """Runs the cases that the arguments describe; rank 0 saves the numbers of each beside the report."""
    arguments, report = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    hide_transformer_engine()
    torch.set_num_threads(1)
    device = join_world("cuda" if arguments["on_gpu"] else "cpu")
    for name, case in arguments["cases"].items():
        numbers = run_case(case, device, report.parent / f"{name}_checkpoints")
        if dist.get_rank() == 0:
            torch.save(numbers, report.parent / f"{name}.pt")
        dist.barrier()
    if dist.get_rank() == 0:
        report.write_text(json.dumps([*arguments["cases"]]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
