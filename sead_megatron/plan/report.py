"""A plan as tables for a terminal, as Markdown for an example's README, and as JSON. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from sead_megatron.plan.devices import GIB
from sead_megatron.plan.fit import USABLE_SHARE, fullest_by_phase
from sead_megatron.plan.lengths import Lengths
from sead_megatron.plan.memory import PHASES, RankMemory, Run
from sead_megatron.plan.search import Candidate
from sead_megatron.plan.timing import Assumptions, StepTime


@dataclass(frozen=True)
class Plan:
    """A planned run: every rank's memory and, on a GPU, a step's time."""

    run: Run
    memory: Sequence[RankMemory]
    time: StepTime | None
    lengths: Lengths
    assumptions: Assumptions

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank."""
        return max(rank.peak for rank in self.memory)

    @property
    def checkpoint_copy(self) -> int:
        """Bytes of host memory on the rank that copies most of a checkpoint."""
        return max(rank.checkpoint_copy for rank in self.memory)

    @property
    def checkpoint_seconds(self) -> float:
        """What a step waits when a checkpoint is due, in no total: files are written beside the next steps."""
        return self.checkpoint_copy / self.assumptions.host_bandwidth


def headline(plan: Plan) -> str:
    """Layouts and world in one line."""
    run = plan.run
    device = run.device.name if run.device else "CPU"
    engine = run.config.rollout.tensor_parallel
    return (
        f"{run.world} x {device}: student {run.student_layout}, "
        + (f"teacher {run.teacher_layout}" if run.teachers else "no teacher")
        + (f", {run.world // engine} engines of TP{engine}" if run.config.loads_engine else ", no engine")
    )


def memory_rows(plan: Plan) -> list[list[str]]:
    """Terms by phase, GiB, each phase on the rank that needs most in it; totals of the first step and of later ones."""
    fullest = fullest_by_phase(plan.memory)
    terms = {name: None for phase in PHASES for name in fullest[phase].terms(phase)}
    rows = [
        [name, *(_gib(fullest[phase].terms(phase).get(name, 0)) for phase in PHASES)]
        for name in terms
        if any(fullest[phase].terms(phase).get(name, 0) for phase in PHASES)
    ]
    rows.append(
        ["total, first step", *(_gib(fullest[phase].total(phase, first_step=True)) for phase in PHASES)]
    )
    rows.append(["total, later steps", *(_gib(fullest[phase].total(phase)) for phase in PHASES)])
    return rows


def time_rows(time: StepTime) -> list[list[str]]:
    """Seconds, share of the step and PFLOPs of each phase."""
    phases = {
        "rollout": time.rollout,
        "teacher": time.teacher,
        "update": time.update,
        "sync": time.sync,
        "overhead": time.overhead,
    }
    rows = [
        [
            name,
            f"{seconds:.1f}",
            f"{seconds / time.total:.0%}",
            f"{time.flops[name] / 1e15:,.1f}" if name in time.flops else "",
        ]
        for name, seconds in phases.items()
    ]
    rows.insert(
        1,
        [
            "of it, last tenth of the rollouts",
            f"{time.rollout_tail:.1f}",
            f"{time.rollout_tail / time.total:.0%}",
            "",
        ],
    )
    rows.append(["step", f"{time.total:.1f}", "100%", f"{sum(time.flops.values()) / 1e15:,.1f}"])
    return rows


def checkpoint_line(plan: Plan) -> str:
    """What a checkpoint takes: host memory, the step's time, and the disk."""
    line = (
        f"checkpoint every {plan.run.config.checkpoint.every} steps: "
        f"{sum(rank.checkpoint_copy for rank in plan.memory) / GIB:.1f} GiB on disk, "
        f"copied to at most {plan.checkpoint_copy / GIB:.2f} GiB of a rank's host memory"
    )
    if plan.time is None:
        return line
    return f"{line} in {plan.checkpoint_seconds:.1f} s, written beside the next steps"


def assumption_lines(plan: Plan) -> list[str]:
    """What the estimate rests on."""
    lines = [plan.lengths.describe()]
    lines += [f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(plan.assumptions).items()]
    device = plan.run.device
    if device is not None:
        lines.append(
            f"{device.name} by its data sheet: {device.bf16_flops / 1e12:,.0f} bf16 TFLOP/s, "
            f"{device.memory_bandwidth / 1e12:.2f} TB/s, NVLink {device.link_bandwidth / 1e9:.0f} GB/s and network "
            f"{device.network_bandwidth / 1e9:.0f} GB/s a direction"
        )
    return lines


_MEMORY_COLUMNS = ["GiB a rank", *PHASES]
_TIME_COLUMNS = ["phase", "seconds", "share", "PFLOP"]


def render(plan: Plan) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = [headline(plan), _table(_MEMORY_COLUMNS, memory_rows(plan))]
    if plan.run.device is not None:
        usable = USABLE_SHARE * plan.run.device.memory_bytes
        parts.append(f"fullest rank {plan.peak / GIB:.1f} GiB, usable {usable / GIB:.1f} GiB")
    parts.append(checkpoint_line(plan))
    if plan.time is not None:
        parts += ["", _table(_TIME_COLUMNS, time_rows(plan.time))]
        parts.append("estimated, not measured; it rests on: " + "; ".join(assumption_lines(plan)))
    return Group(*parts)


def markdown(plan: Plan) -> str:
    """For a README."""
    parts = [headline(plan), "", *_markdown_table(_MEMORY_COLUMNS, memory_rows(plan))]
    parts += ["", f"A {checkpoint_line(plan)}."]
    if plan.time is not None:
        parts += ["", *_markdown_table(_TIME_COLUMNS, time_rows(plan.time))]
        parts += ["", "Estimated, not measured; it rests on: " + "; ".join(assumption_lines(plan)) + "."]
    return "\n".join(parts)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "headline": headline(plan),
        "peak_bytes": plan.peak,
        "ranks": [
            {
                "rank": rank.rank,
                "peak_phase": rank.peak_phase,
                "checkpoint_copy": rank.checkpoint_copy,
                "phases": {
                    phase: {
                        "first_step": rank.terms(phase, first_step=True),
                        "later_steps": rank.terms(phase),
                    }
                    for phase in PHASES
                },
            }
            for rank in plan.memory
        ],
        "time": None
        if plan.time is None
        else asdict(plan.time) | {"total": plan.time.total, "checkpoint": plan.checkpoint_seconds},
        "assumptions": asdict(plan.assumptions) | {"lengths": plan.lengths.describe()},
    }


def render_candidates(candidates: Sequence[Candidate]) -> RenderableType:
    """The result of a search, fastest first, and the overrides of the first."""
    columns = [
        "s a step",
        "rollout",
        "teacher",
        "update",
        "GiB",
        "student",
        "recompute",
        "teacher",
        "engine TP",
        "rollouts",
    ]
    rows = []
    for found in candidates:
        config = found.run.config
        times = (found.time.total, found.time.rollout, found.time.teacher, found.time.update)
        rows.append(
            [
                *(f"{seconds:.1f}" for seconds in times),
                _gib(found.memory.peak),
                str(found.run.student_layout),
                config.student.recompute,
                str(found.run.teacher_layout),
                str(config.rollout.tensor_parallel),
                "fp8" if config.rollout.quantization == "fp8" else config.rollout_dtype,
            ]
        )
    best = " ".join(candidates[0].overrides)
    return Group(_table(columns, rows), f"overrides of the first: {best}")


def print_plan(content: RenderableType) -> None:
    """To standard output, wide enough for the tables."""
    Console(width=120, highlight=False).print(content)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
