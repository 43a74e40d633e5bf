"""Everything of a run that needs no weights and no GPU: configuration, layouts, rank mapping, models on `meta`.

One process plays every rank of the world in turn over torch's fake process group, whose collectives do nothing. Layers
are the local ones: Transformer Engine's, FP8 and the engine are not built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sead_megatron.config import TrainConfig, check_models
from sead_megatron.config.models import ParallelConfig
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.build import BuiltModel, build_model
from sead_megatron.models.precision import Precision
from sead_megatron.models.stages import stage_layers
from sead_megatron.objectives import build_objective
from sead_megatron.parallel.groups import destroy_groups, student_groups, teacher_groups
from sead_megatron.parallel.layout import Layout
from sead_megatron.plan.shards import stage_parameters


@dataclass(frozen=True)
class RankMap:
    """Where a rank stands in each of the three layouts."""

    rank: int
    student: tuple[int, int, int]
    """(data, pipeline, tensor) ranks."""
    student_layers: range
    teacher: tuple[int, int, int] | None
    """None in a run that loads no teacher, as its layers."""
    teacher_layers: range | None
    engine: tuple[int, int]
    """(replica, tensor rank)."""


@dataclass(frozen=True)
class DryRun:
    """What was built: the mapping of all ranks, and parameters of the ranks whose models were made."""

    ranks: list[RankMap]
    parameters: dict[int, tuple[int, int]]
    """Rank -> elements of its student shard and of all its teacher shards."""


def dry_run(config: TrainConfig, student: HFConfig, teachers: Sequence[HFConfig], world_size: int) -> DryRun:
    """Builds groups on every rank and models on one rank of each pair of stages.

    `check_models` must have passed. Raises RuntimeError where a model is not what the plan reckons
    with, KeyError for a parameter that no weight table knows.
    """
    from sead_megatron.parallel import megatron_on_cpu

    megatron_on_cpu.install()
    models = [student, *teachers]
    parallels = _parallel(config, models)
    layouts = [Layout(parallel.tensor, parallel.pipeline, world_size) for parallel in parallels[:2]]
    stages = [
        stage_layers(model, parallel.pipeline, parallel.stages)
        for model, parallel in zip(models, parallels, strict=True)
    ]
    ranks: list[RankMap] = []
    parameters: dict[int, tuple[int, int]] = {}
    seen: set[tuple[int, ...]] = set()
    for rank in range(world_size):
        with _rank_of_a_fake_world(rank, world_size):
            built = _Models(config, models, layouts, stages)
            ranks.append(_rank_map(rank, layouts, stages, config.rollout.tensor_parallel))
            kind = tuple(layout.pp_rank(rank) for layout in layouts)
            if kind not in seen:
                seen.add(kind)
                parameters[rank] = built.build()
    return DryRun(ranks, parameters)


def _parallel(config: TrainConfig, models: Sequence[HFConfig]) -> list[ParallelConfig]:
    """Of the student and each teacher."""
    return [config.student.parallel, *[config.teacher.parallel] * (len(models) - 1)]


@contextmanager
def _rank_of_a_fake_world(rank: int, world_size: int) -> Iterator[None]:
    # Of torch's own tests, and the only backend that stands for ranks that are not there.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_groups()
        dist.destroy_process_group()


class _Models:
    """All models' groups on this rank, and the models when asked for: the student, then the teachers."""

    def __init__(
        self,
        config: TrainConfig,
        models: Sequence[HFConfig],
        layouts: list[Layout],
        stages: list[tuple[int, ...]],
    ) -> None:
        self._config = config
        self._configs = models
        self._stages = stages
        self._groups = [student_groups(layouts[0]), *map(teacher_groups, layouts[1:])]

    def build(self) -> tuple[int, int]:
        """Elements of the student's shard, and of the teachers'."""
        student, *teachers = (self._model(i, trainable=i == 0) for i in range(len(self._configs)))
        return student, sum(teachers)

    def _model(self, index: int, *, trainable: bool) -> int:
        config, groups, stages = self._configs[index], self._groups[min(index, 1)], self._stages[index]
        parallel = _parallel(self._config, self._configs)[index]
        with torch.device("meta"):
            model = build_model(
                config,
                groups,
                Precision(torch.bfloat16),
                on_cpu=True,
                trainable=trainable,
                sequence_parallel=parallel.sequence_parallel,
                recompute=trainable and self._config.student.recompute == "full",
                stages=stages,
            )
        planned = stage_parameters(
            config, groups.layout.tensor, stages, groups.pp_rank, trained=trainable, fused_norms=False
        )
        _compare(model, {shard.name: shard.numel for shard in planned})
        return sum(shard.numel for shard in planned)


def _compare(model: BuiltModel, planned: dict[str, int]) -> None:
    built = {name: parameter.numel() for name, parameter in model.module.named_parameters()}
    if built != planned:
        differing = sorted(set(built.items()) ^ set(planned.items()))
        raise RuntimeError(f"the model on this rank is not the planned one: {differing[:4]}")
    for name in built:
        model.weights.rule(name)


def _rank_map(rank: int, layouts: list[Layout], stages: list[tuple[int, ...]], engine: int) -> RankMap:
    places = [(layout.dp_rank(rank), layout.pp_rank(rank), layout.tp_rank(rank)) for layout in layouts]
    layers = []
    # The first teacher's: others may have other numbers of layers in the same stages.
    for (_, stage, _), sizes in zip(places, stages[:2], strict=True):
        first = sum(sizes[:stage])
        layers.append(range(first, first + sizes[stage]))
    has_teacher = len(layouts) > 1
    return RankMap(
        rank,
        student=places[0],
        student_layers=layers[0],
        teacher=places[1] if has_teacher else None,
        teacher_layers=layers[1] if has_teacher else None,
        engine=(rank // engine, rank % engine),
    )


def print_dry_run(config: TrainConfig, world_size: int, ranks_per_node: int) -> None:
    """`dry_run` of a configuration's models, printed; only their config.json is needed.

    Raises UserError where the configuration's fields, its layouts or its formats do not go together.
    """
    models = check_models(config, world_size)
    build_objective(config.objective, config.steps)
    result = dry_run(config, models.student, tuple(models.teachers.values()), world_size)
    console = Console(width=120, highlight=False)
    console.print(rank_table(result, ranks_per_node))
    for rank, (student_size, teacher_size) in result.parameters.items():
        teacher = f", teacher {teacher_size:,}" if models.teachers else ""
        console.print(f"built on rank {rank}: student {student_size:,}{teacher} parameters")
    teacher = f"teacher {models.teacher_layout}" if models.teachers else "no teacher"
    console.print(
        f"{world_size} ranks: student {models.student_layout}, {teacher}; configuration, layouts and models fit each "
        "other"
    )


def rank_table(result: DryRun, ranks_per_node: int) -> Table:
    """One row a rank: its node, its place in each layout, its layers."""
    table = Table(box=None, pad_edge=False)
    columns = ["rank", "node", "student dp pp tp", "layers", "teacher dp pp tp", "layers", "engine", "tp"]
    for column in columns:
        table.add_column(column, justify="right")
    for entry in result.ranks:
        table.add_row(
            str(entry.rank),
            str(entry.rank // ranks_per_node),
            " ".join(map(str, entry.student)),
            _span(entry.student_layers),
            " ".join(map(str, entry.teacher or "-")),
            _span(entry.teacher_layers),
            *map(str, entry.engine),
        )
    return table


def _span(layers: range | None) -> str:
    return "-" if layers is None else f"{layers.start}-{layers.stop - 1}"
