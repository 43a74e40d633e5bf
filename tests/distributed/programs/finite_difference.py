"""The analytic gradient of a step against central differences of its loss, all in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import rank
import torch
import torch.distributed as dist
from update import config_of, fixed_rollouts

Tensors = dict[str, torch.Tensor]
# The fourth-order formula's error is O(step^4) on a direction of unit norm in every weight.
STEP = 2e-4
# Offsets and weights of f'(0) = (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h.
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


@contextmanager
def float64_training() -> Iterator[None]:
    """Weights of both models and gradient buffers in float64; the production code has float32 buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from sead_megatron.models.precision import Precision
    from sead_megatron.training import models, student

    def wrap(model: Any, *, distributed_optimizer: bool) -> Any:
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=False, use_distributed_optimizer=False)
        return DistributedDataParallel(
            model.module.config, config, model.module, pg_collection=model.groups.collection
        )

    with (
        mock.patch.object(models, "student_precision", lambda config: Precision(torch.float64)),
        mock.patch.object(models, "teacher_precision", lambda config: Precision(torch.float64)),
        mock.patch.object(student, "wrap_for_training", wrap),
    ):
        yield


class Gradient:
    """A student whose step computes loss and gradient and leaves the weights alone."""

    def __init__(self, case: dict[str, Any], student: str, teacher: str) -> None:
        from sead_megatron.data.types import TokenTable
        from sead_megatron.objectives import build_objective
        from sead_megatron.training.models import build_models
        from sead_megatron.training.optimizer import StepResult
        from sead_megatron.training.step_plan import plan_step

        config = config_of({"distributed": False, "max_tokens": 64, "packing": True} | case, student, teacher)
        with float64_training():
            models = build_models(config, torch.device("cpu"))
        self.student = models.student
        self.built = models.student.model
        self.student.optimizer.step = lambda loss_is_finite: StepResult(False, 0.0, 0.0)
        self.plan = plan_step(fixed_rollouts(0, 6), self.built.groups.layout)
        self.scores = models.teachers.score(self.plan)
        table = TokenTable.from_rollouts(self.plan.rollouts, "cpu")
        table = table.with_columns(**self.student.token_stats(self.plan, self.scores))
        # The zones are decided once: they are constants of the loss.
        self.coefficients = build_objective(config.objective, 2).coefficients(table, 0)

    def loss(self) -> float:
        """The global loss; the gradient is in `main_grad` afterwards."""
        return self.student.train_step(self.plan, self.scores, self.coefficients).loss

    def loss_at(self, weights: Tensors, direction: Tensors, offset: float) -> float:
        """The loss at `weights + offset * direction`."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(weights[name] + offset * direction[name])
        return self.loss()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.built.module.named_parameters())

    def dot(self, directions: Tensors) -> float:
        """Gradient times direction over the whole model: replicated parameters and tied copies count once."""
        total = torch.zeros((), dtype=torch.float64)
        for name, parameter in self.parameters().items():
            assert parameter.main_grad.dtype == torch.float64
            rule = self.built.weights.rule(name)
            replicated = rule.layout.partition_dim is None and self.built.groups.tp_rank > 0
            if not replicated and not rule.is_tied_copy:
                total += (parameter.main_grad * directions[name]).sum()
        dist.all_reduce(total)
        return float(total)


def body(students: dict[str, str], teacher: str, directions: list[str], cases: list[dict[str, Any]]) -> Any:
    """For each case and direction (a Hugging Face directory of tensors): (analytic, numeric) derivative."""
    from sead_megatron.models.load import load_weights
    from sead_megatron.parallel.groups import destroy_groups

    results = []
    for case in cases:
        gradient = Gradient(case, students[case["model"]], teacher)
        parameters = gradient.parameters()
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        pairs = []
        for directory in directions:
            load_weights(gradient.built, str(Path(directory) / case["model"]))
            direction = {name: parameter.detach().clone() for name, parameter in parameters.items()}

            losses = [gradient.loss_at(weights, direction, offset * STEP) for offset, _ in STENCIL]
            numeric = sum(weight * loss for (_, weight), loss in zip(STENCIL, losses, strict=True)) / STEP
            gradient.loss_at(weights, direction, 0.0)
            pairs.append((gradient.dot(direction), numeric))
        results.append(pairs)
        destroy_groups()
    return results


if __name__ == "__main__":
    rank.run(body)
