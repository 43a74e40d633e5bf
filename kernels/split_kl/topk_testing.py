"""What the tests of top-k losses share: targets from dense models, the losses on them, their reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from .entropy_state import EntropyStats, finalize_entropy
from .reference import dense_topk_loss
from .support import SupportGradient
from .testing import SMALL_TILES, Problem, coefficients_of, merged_entropy
from .tiling import TileOptions
from .topk import NO_ID
from .topk_loss import TopKOutput, topk_loss
from .topk_stats import TopKStats, topk_stats_and_gradient
from .topk_target import TopKTarget


def dense_target(
    problem: Problem, topk: int, temperature: float = 1.0, support: str = "teacher"
) -> TopKTarget:
    """From both dense float64 models."""
    logprobs, order = {}, {}
    for model in ("student", "teacher"):
        hidden, weight = getattr(problem, f"{model}_hidden"), getattr(problem, f"{model}_weight")
        logits = hidden.double() @ weight[: problem.valid].double().t()
        logprobs[model] = (logits / temperature).log_softmax(-1)
        order[model] = logits.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    kept = {model: torch.zeros_like(logprobs[model], dtype=torch.bool) for model in order}
    for model, ids in order.items():
        kept[model].scatter_(1, ids, True)
    inside = {
        **kept,
        "union": kept["student"] | kept["teacher"],
        "intersection": kept["student"] & kept["teacher"],
    }[support]
    wide = inside.sum(1).max() + 1  # an empty slot in every row
    ids = torch.where(inside, torch.arange(problem.valid), NO_ID).sort(dim=1).values[:, :wide]
    if support in order:
        ids = order[support]
    log_q = logprobs["teacher"]
    values = log_q.gather(1, ids.clamp(max=problem.valid - 1)).masked_fill(ids == NO_ID, math.nan)
    return TopKTarget(ids, values, (log_q.exp() * ~inside).sum(1))


def expected_step(
    problem: Problem, ids: Tensor, rule: str, coefficients: Tensor, temperature: float = 1.0
) -> tuple[float, Tensor, Tensor, Tensor]:
    """(loss, terms [T, 4], dh, dW) of the dense reference."""
    hidden = problem.student_hidden.double().requires_grad_()
    weight = problem.student_weight.double().requires_grad_()
    loss, terms = dense_topk_loss(
        hidden, weight, *problem.inputs()[2:], coefficients, ids, rule, valid=problem.valid, temperature=temperature
    )  # fmt: skip
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.item(), terms, hidden.grad, weight.grad


def student_pass(
    problem: Problem, target: TopKTarget, ranks: int = 1, temperature: float = 1.0, tiles: TileOptions = SMALL_TILES
) -> EntropyStats:  # fmt: skip
    merged = merged_entropy(
        problem, ranks, model="student", temperature=temperature, gather_ids=target.ids, options=tiles
    )
    return finalize_entropy(merged, problem.valid, target.ids)


def stats_and_gradient(
    problem: Problem, target: TopKTarget, rule: str = "tail"
) -> tuple[TopKStats, SupportGradient]:
    student = student_pass(problem, target)
    return topk_stats_and_gradient(student, target, problem.labels, coefficients_of(rule, problem), rule)


def topk_step(
    problem: Problem,
    target: TopKTarget,
    rule: str,
    tiles: TileOptions = SMALL_TILES,
    coefficients: Tensor | None = None,
) -> tuple[TopKOutput, Tensor, Tensor]:
    """(output, dh, dW) of the autograd node."""
    hidden = problem.student_hidden.clone().requires_grad_()
    weight = Parameter(problem.student_weight.clone())
    if coefficients is None:
        coefficients = coefficients_of(rule, problem)
    output = topk_loss(
        hidden, weight, target, problem.labels, coefficients, rule=rule, shard=problem.shard(), tp_group=None,
        options=tiles,
    )  # fmt: skip
    output.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return output, hidden.grad, weight.grad


def topk_loss_on_own_topk(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    *,
    topk: int,
    options: TileOptions,
    rule: str = "tail",
    support: str = "teacher",
) -> Tensor:
    """The loss on the top-k that the same backend finds; ``hidden``, ``weight``: student leaves."""
    student_ids = None
    if support != "teacher":
        student_ids = merged_entropy(problem, 1, model="student", topk=topk, options=options).topk_ids
    teacher = merged_entropy(problem, 1, topk=topk, gather_ids=student_ids, options=options)
    return topk_loss(
        hidden,
        weight,
        TopKTarget.of(finalize_entropy(teacher, problem.valid), support, student_ids),
        problem.labels,
        coefficients_of(rule, problem),
        rule=rule,
        shard=problem.shard(),
        tp_group=None,
        options=options,
    ).loss
