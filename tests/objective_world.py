"""A batch of rollouts over a vocabulary of seven, small enough for finite differences of a whole loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sead_megatron.data.types import Coefficients, RolloutFacts, TokenTable
from sead_megatron.objectives import OBJECTIVES, Objective, build_objective
from sead_megatron.training.topk_columns import TOPK_COLUMNS

VOCABULARY = 7
# Two prompts with three rollouts each; one is empty, one has a single token.
LENGTHS = [5, 0, 3, 1, 6, 4]
SAMPLING_TEMPERATURE = 0.7


@dataclass(frozen=True)
class World:
    """Logits float64 [N, V] of three models, sampled tokens [N] and facts of the rollouts."""

    student: Tensor
    teacher: Tensor
    reference: Tensor
    labels: Tensor
    offsets: Tensor
    facts: RolloutFacts

    @property
    def num_tokens(self) -> int:
        return len(self.labels)

    def slices(self) -> list[slice]:
        """The tokens of each rollout."""
        bounds = self.offsets.tolist()
        return [slice(a, b) for a, b in pairwise(bounds)]

    def table(self) -> TokenTable:
        """Every column, float32."""
        q, p = self.student.log_softmax(-1), self.teacher.log_softmax(-1)
        columns = {
            "student_entropy": -(q.exp() * q).sum(-1),
            "teacher_entropy": -(p.exp() * p).sum(-1),
            "forward_kl": (p.exp() * (p - q)).sum(-1),
            "reverse_kl": (q.exp() * (q - p)).sum(-1),
            "student_logprob": self.sampled(q),
            "teacher_logprob": self.sampled(p),
            "rollout_logprob": self.sampled(q),
            "sampling_logprob": self.sampled((self.student / SAMPLING_TEMPERATURE).log_softmax(-1)),
            "reference_logprob": self.sampled(self.reference.log_softmax(-1)),
            **self.list_columns(),
            "argmax_student_logprob": q.gather(-1, self.teacher_argmax[:, None])[:, 0],
            "argmax_teacher_logprob": p.max(-1).values,
        }
        return TokenTable(
            offsets=self.offsets,
            rollouts=self.facts,
            **{name: column.float() for name, column in columns.items()},  # type: ignore[arg-type]
        )

    @property
    def teacher_argmax(self) -> Tensor:
        """The teacher's likeliest token, int64 [N]."""
        return self.teacher.argmax(-1)

    def list_columns(self, k: int = 5) -> dict[str, Tensor]:
        """What compares the k likeliest tokens of both models, token by token in plain loops, float64 [N]."""
        q, p = self.student.softmax(-1).tolist(), self.teacher.softmax(-1).tolist()
        columns: dict[str, list[float]] = {name: [] for name in TOPK_COLUMNS}
        for student, teacher in zip(q, p, strict=True):
            mine, theirs = (
                sorted(range(VOCABULARY), key=lambda v: -row[v])[:k] for row in (student, teacher)
            )
            columns["topk_overlap"].append(len(set(mine) & set(theirs)) / k)
            columns["topk_student_mass"].append(sum(student[v] for v in theirs))
            columns["topk_teacher_mass"].append(sum(teacher[v] for v in mine))
            advantages = sorted((math.log(teacher[v] / student[v]) for v in mine), reverse=True)
            columns["topk_margin"].append(advantages[0] - advantages[1])
            head, mass = [], 0.0
            for v in theirs:
                if mass < 0.5:
                    head.append(v)
                    mass += teacher[v]
            gaps = [abs(a - b) for a, b in zip(student, teacher, strict=True)]
            columns["gap_head"].append(sum(gaps[v] for v in head))
            columns["gap_tail"].append(sum(gaps) - columns["gap_head"][-1])
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}

    def sampled(self, values: Tensor) -> Tensor:
        """Entries [N] of the sampled tokens."""
        return values.gather(-1, self.labels[:, None])[:, 0]


def make_world(seed: int = 3, lengths: list[int] | None = None, rewards: list[float] | None = None) -> World:
    """Random models of all degrees of certainty."""
    lengths = LENGTHS if lengths is None else lengths
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    sharpness = 4 * torch.rand(3, tokens, 1, generator=generator, dtype=torch.float64)
    student, teacher, reference = sharpness * torch.randn(
        3, tokens, VOCABULARY, generator=generator, dtype=torch.float64
    )
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0][: len(lengths)] if rewards is None else rewards
    return World(
        student,
        teacher,
        reference,
        labels,
        torch.tensor([0, *lengths]).cumsum(0),
        RolloutFacts(
            group=torch.arange(len(lengths)) // 3,
            reward=torch.tensor(rewards),
            finished=torch.ones(len(lengths), dtype=torch.bool),
            longest=8,
            difficulty=torch.tensor([0.25, 0.25, 0.25, 0.875, 0.875, 0.875][: len(lengths)]),
        ),
    )


def make_objective(name: str, total_steps: int = 4, **settings: Any) -> Objective[Any]:
    return build_objective(OBJECTIVES[name][0].model_validate({"name": name, **settings}), total_steps)


def loss_gradient(world: World, coefficients: Coefficients, *, has_teacher: bool = True) -> Tensor:
    """dL/dz [N, V] by the trainer's own loss and kernels: logits as hidden states, the identity as output layer."""
    from sead_kernels.split_kl import TileOptions, VocabShard

    from sead_megatron.training.device_rows import ActiveRows
    from sead_megatron.training.token_loss import LossContext, token_loss

    logits = world.student.clone().requires_grad_()
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    shard = VocabShard(start=0, valid=VOCABULARY)
    context = LossContext(shard, None, 1.0, TileOptions(backend="torch", tokens=8, vocab=4))
    weights = (coefficients.weights.double() / coefficients.normalizer).float()
    teacher = (world.teacher, identity) if has_teacher else None
    result = token_loss(
        logits,
        identity,
        teacher,
        world.labels,
        weights,
        ActiveRows.of(weights != 0, coefficients.divergence, weights.device),
        coefficients.divergence,
        context,
        teacher_argmax=coefficients.teacher_argmax,
    )
    (gradient,) = torch.autograd.grad(result.loss, logits)
    return gradient


def finite_differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar, entry by entry."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at).view(-1)
        shift[index] = step
        shift = shift.view_as(at)
        gradient.view(-1)[index] = (loss(at + shift) - loss(at - shift)) / (2 * step)
    return gradient
