"""Seeded problems that the tests of this package share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .api import linear_entropy, linear_stats
from .backends import BACKENDS
from .checks import COEFFICIENTS
from .cuda import CudaTiles
from .entropy_state import EntropyState, finalize_entropy, merge_entropy
from .loss import split_kl_loss
from .pointwise import PointwiseRule
from .pointwise_loss import PointwiseOutput, pointwise_loss
from .state import merge
from .tensor_parallel import merge_tp
from .tile_loop import TiledBackend
from .tiling import TileOptions, VocabShard
from .topk_loss import topk_loss
from .topk_rules import RULES
from .topk_target import TopKTarget

EMULATED = "cuda-emulated"

# Every kind, with and without a clip that clamps some entries of the problems below and not others.
POINTWISE_RULES = [
    PointwiseRule("jsd", 0.5),
    PointwiseRule("jsd", 0.1, clip=0.01),
    PointwiseRule("skew_forward", 0.1),
    PointwiseRule("skew_forward", 0.3, clip=0.05),
    PointwiseRule("skew_reverse", 0.1),
    PointwiseRule("skew_reverse", 0.7, clip=0.05),
    PointwiseRule("forward"),
    PointwiseRule("forward", clip=0.05),
    PointwiseRule("reverse"),
    PointwiseRule("reverse", clip=0.05),
]
TENSOR_PARALLEL_RULE = POINTWISE_RULES[1]


def small_tiles(backend: str) -> TileOptions:
    """Tiles that divide none of the test shapes: every loop ends with a ragged one."""
    return TileOptions(backend=backend, tokens=7, vocab=24)


SMALL_TILES = small_tiles("auto")


def register_emulated() -> None:
    """Make the CUDA source, compiled for the host, the backend ``EMULATED``."""
    BACKENDS.setdefault(EMULATED, TiledBackend(CudaTiles(emulated=True)))


@dataclass(frozen=True)
class Problem:
    """Student and teacher of different widths; weights hold ``valid`` rows and then padding."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    coefficients: Tensor
    valid: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight, self.labels

    def shard(self) -> VocabShard:
        return VocabShard(start=0, valid=self.valid)

    def local(self, rank: int, ranks: int) -> tuple[Problem, VocabShard]:
        """What one of ``ranks`` tensor-parallel ranks holds."""
        rows = self.student_weight.shape[0] // ranks
        mine = slice(rank * rows, (rank + 1) * rows)
        local = replace(
            self,
            student_weight=self.student_weight[mine].clone(),
            teacher_weight=self.teacher_weight[mine].clone(),
        )
        return local, VocabShard(start=rank * rows, valid=self.valid)


class LargestOutput(TorchDispatchMode):
    """Records the largest element count of any operator's output; bytes (uint8) are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.uint8:
                self.numel = max(self.numel, leaf.numel())
        return result


def make_problem(
    *,
    tokens: int = 19,
    valid: int = 117,
    padded: int = 128,
    student_width: int = 16,
    teacher_width: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Logits of standard deviation about 2. Padding rows are large: one that is not masked is seen at once.

    Coefficients use all four columns, have negative entries and, in every third row, are all zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_weight, teacher_weight = normal(padded, student_width) / 2, normal(padded, teacher_width) / 2.4
    student_weight[valid:] *= 50
    teacher_weight[valid:] *= 50
    coefficients = normal(tokens, 4)
    coefficients[::3] = 0
    return Problem(
        student_hidden=normal(tokens, student_width).to(dtype),
        student_weight=student_weight.to(dtype),
        teacher_hidden=normal(tokens, teacher_width).to(dtype),
        teacher_weight=teacher_weight.to(dtype),
        labels=torch.randint(0, valid, (tokens,), generator=generator),
        coefficients=coefficients.float(),
        valid=valid,
    )


def merged_state(
    problem: Problem, ranks: int, *, temperature: float = 1.0, options: TileOptions = SMALL_TILES
) -> Tensor:
    """The state over all shards, folded in rank order in this process."""
    shards = [problem.local(rank, ranks) for rank in range(ranks)]
    parts = [
        linear_stats(*local.inputs(), shard=shard, temperature=temperature, options=options)
        for local, shard in shards
    ]
    return functools.reduce(merge, parts)


def merged_entropy(
    problem: Problem,
    ranks: int,
    *,
    model: Literal["student", "teacher"] = "teacher",
    temperature: float = 1.0,
    topk: int = 0,
    gather_ids: Tensor | None = None,
    options: TileOptions = SMALL_TILES,
) -> EntropyState:
    """As :func:`merged_state`, of one model."""
    shards = [problem.local(rank, ranks) for rank in range(ranks)]
    parts = [
        linear_entropy(
            getattr(local, f"{model}_hidden"),
            getattr(local, f"{model}_weight"),
            local.labels,
            shard=shard,
            temperature=temperature,
            topk=topk,
            gather_ids=gather_ids,
            options=options,
        )
        for local, shard in shards
    ]
    return functools.reduce(merge_entropy, parts)


def coefficients_of(rule: str, problem: Problem) -> Tensor:
    """Those of the problem, 0 for a divergence that the rule does not define."""
    coefficients = problem.coefficients.clone()
    for column, name in enumerate(COEFFICIENTS[:2]):
        if name not in RULES[rule].divergences:
            coefficients[:, column] = 0
    return coefficients


def run_pointwise(
    problem: Problem, hidden: Tensor, weight: Tensor, rule: PointwiseRule, **settings: Any
) -> PointwiseOutput:
    """The loss with the first column of the coefficients; ``hidden``, ``weight``: student leaves."""
    settings = {"shard": problem.shard(), "tp_group": None, "options": SMALL_TILES} | settings
    return pointwise_loss(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        problem.coefficients[:, 0].contiguous(),
        rule,
        **settings,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def tensor_parallel_rank(rank: int, ranks: int, directory: str, backend: str) -> None:
    """Process ``rank`` of test_tp.py: save to ``directory`` what its shard gave, and its gradients.

    Lives here because a spawned process imports its target by name, and a test module's name depends on the
    runner.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    register_emulated()
    tiles = small_tiles(backend)
    problem, shard = make_problem().local(rank, ranks)
    state = merge_tp(linear_stats(*problem.inputs(), shard=shard, options=tiles), group)
    entropy = {}
    for topk in (0, 40):
        part = linear_entropy(
            problem.teacher_hidden,
            problem.teacher_weight,
            problem.labels,
            shard=shard,
            topk=topk,
            options=tiles,
        )
        entropy[topk] = finalize_entropy(merge_tp(part, group), problem.valid)
    weight, hidden = Parameter(problem.student_weight), problem.student_hidden.requires_grad_()
    output = split_kl_loss(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        problem.coefficients,
        shard=shard,
        tp_group=group,
        options=tiles,
    )
    output.loss.backward()
    gradients = {"exact": (hidden.grad, weight.grad)}
    hidden.grad = weight.grad = None
    settings = {"shard": shard, "tp_group": group, "options": tiles}
    pointwise = run_pointwise(problem, hidden, weight, TENSOR_PARALLEL_RULE, **settings)
    pointwise.loss.backward()
    gradients["pointwise"] = (hidden.grad, weight.grad)
    # Nothing active anywhere: no rank may wait for another one.
    empty = split_kl_loss(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        torch.zeros_like(problem.coefficients),
        shard=shard,
        tp_group=group,
        options=tiles,
    )
    empty.loss.backward()
    nothing = replace(problem, coefficients=torch.zeros_like(problem.coefficients))
    run_pointwise(nothing, hidden, weight, TENSOR_PARALLEL_RULE, **settings).loss.backward()
    shared = {"state": state, "loss": output.loss.detach(), "active": output.active}
    shared |= {f"stats.{name}": value for name, value in output.stats._asdict().items()}
    shared["pointwise.loss"] = pointwise.loss.detach()
    shared |= {f"pointwise.{name}": value for name, value in pointwise.stats._asdict().items()}
    for topk, stats in entropy.items():
        shared |= {f"{topk}.{name}": value for name, value in stats._asdict().items() if value is not None}
    target = _union_of_shards(problem, shard, group, tiles)
    for rule in RULES:
        on_rule, gradients[rule] = _topk_on_shard(problem, target, shard, group, tiles, rule)
        shared |= {f"{rule}.{name}": value for name, value in on_rule.items()}
    shared["ids"] = target.ids
    torch.save({"shared": shared, "gradients": gradients}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def _union_of_shards(
    problem: Problem, shard: VocabShard, group: dist.ProcessGroup | None, tiles: TileOptions
) -> TopKTarget:
    """Of both models' top 8, found by the group."""
    student_ids, stats = None, None
    for hidden, weight in (problem.inputs()[:2], problem.inputs()[2:4]):
        part = linear_entropy(
            hidden.detach(),
            weight.detach(),
            problem.labels,
            shard=shard,
            topk=8,
            gather_ids=student_ids,
            options=tiles,
        )
        stats = finalize_entropy(merge_tp(part, group), problem.valid)
        student_ids = stats.topk_ids if student_ids is None else student_ids
    assert stats is not None
    return TopKTarget.of(stats, "union", student_ids)


def _topk_on_shard(
    problem: Problem,
    target: TopKTarget,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    tiles: TileOptions,
    rule: str,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(what all ranks share, (dh, dW)) of a rule."""
    weight = Parameter(problem.student_weight.detach().clone())
    hidden = problem.student_hidden.detach().clone().requires_grad_()
    active, empty = (
        topk_loss(
            hidden,
            weight,
            target,
            problem.labels,
            coefficients,
            rule=rule,
            shard=shard,
            tp_group=group,
            options=tiles,
        )
        for coefficients in (coefficients_of(rule, problem), torch.zeros_like(problem.coefficients))
    )
    active.loss.backward()
    # Nothing active anywhere: no rank may wait for another one.
    empty.loss.backward()
    stats = {name: value for name, value in active.stats._asdict().items() if value is not None}
    return {"loss": active.loss.detach(), "active": active.active, **stats}, (hidden.grad, weight.grad)
