"""The student: Megatron model, gradient buffers and optimizer, and the two passes a step runs through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from sead_kernels.split_kl import TileOptions, VocabShard, finalize, linear_stats, merge_tp
from torch import Tensor

from sead_megatron.config import TrainConfig
from sead_megatron.data.packing import PackedRow, build_row, pack_rows
from sead_megatron.data.terms import Divergence, Term
from sead_megatron.data.types import Coefficients
from sead_megatron.models.build import BuiltModel
from sead_megatron.training.device_rows import ActiveRows, StudentRow, check_labels, row_to_device
from sead_megatron.training.optimizer import StudentOptimizer, wrap_for_training
from sead_megatron.training.pipeline import forward_row, response_rows, run_rows
from sead_megatron.training.step_plan import StepPlan
from sead_megatron.training.teachers import Scores
from sead_megatron.training.token_columns import share_columns
from sead_megatron.training.token_loss import (
    MEASURED,
    OF_STUDENT,
    LossContext,
    measured_by,
    one_model_statistics,
    present,
    token_loss,
)
from sead_megatron.training.topk_columns import (
    ARGMAX_COLUMNS,
    TOPK_COLUMNS,
    argmax_columns,
    topk_columns,
)


@dataclass(frozen=True, eq=False)
class Update:
    """One optimizer step: the global loss, what was done, and the statistics of the active tokens.

    `columns` are float32 [N], equal on all ranks, 0 where `active` is False.
    """

    loss: float
    applied: bool
    grad_norm: float
    lr: float
    active: Tensor
    columns: dict[str, Tensor]


class Student:
    """The trained model of this rank, in its own layout."""

    def __init__(self, model: BuiltModel, config: TrainConfig, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._sequence_parallel = config.student.parallel.sequence_parallel
        self._has_teacher = bool(config.teachers)
        self._max_tokens = config.batch.max_tokens_per_microbatch
        self._packing = config.batch.packing
        self.temperature = config.objective.temperature
        kernel = config.kernel
        self.tile_options = TileOptions(
            backend=kernel.backend,
            tokens=kernel.tile_tokens,
            vocab=kernel.tile_vocab,
            cache_mib=kernel.cache_mib,
            check_finite=kernel.check_finite,
            # Labels are checked where rows are built, and every other id is one that a kernel found.
            check_values=False,
        )
        self.shard = VocabShard(start=model.vocab_start, valid=model.config.vocab_size)
        groups = model.groups
        tied = model.config.tie_word_embeddings and groups.layout.pipeline == 1
        self._context = LossContext(
            self.shard, groups.collection.tp, self.temperature, self.tile_options, tied
        )
        self.ddp = wrap_for_training(model, distributed_optimizer=config.optimizer.distributed)
        self.optimizer = StudentOptimizer(config.optimizer, model, self.ddp, config.steps)
        megatron = model.module.config
        megatron.no_sync_func = self.ddp.no_sync
        megatron.finalize_model_grads_func = _finalize_without_averaging

    @property
    def is_scorer(self) -> bool:
        """True on ranks of the last stage: they hold both output layers and compute the loss."""
        return self.model.groups.is_last_stage

    def token_stats(
        self, plan: StepPlan, scores: Scores | None, topk: int = 0, *, teacher_argmax: bool = False
    ) -> dict[str, Tensor]:
        """Every statistic of every response token by a forward-only pass; float32 [N], equal on all ranks.

        Without a teacher only those of the student. `topk`: compare lists of that many likeliest tokens as well; 0 for
        none. `teacher_argmax`: measure both models on the teacher's likeliest token as well.
        """
        names: tuple[str, ...] = MEASURED if self._has_teacher else OF_STUDENT
        names += TOPK_COLUMNS if topk else ()
        names += ARGMAX_COLUMNS if teacher_argmax else ()

        def measure(hidden: Tensor, row: StudentRow) -> tuple[Tensor, dict[str, Tensor]]:
            teacher = self._teacher_of(row)
            if teacher is None:
                return row.token_index, self._own_statistics(hidden, row.labels)
            pair = (hidden, self.model.module.output_weight().detach(), *teacher)
            state = linear_stats(
                *pair,
                row.labels,
                shard=self.shard,
                temperature=self.temperature,
                options=self.tile_options,
            )
            stats = finalize(merge_tp(state, self.model.groups.collection.tp))
            columns = {name: getattr(stats, name) for name in MEASURED}
            if teacher_argmax:
                columns |= argmax_columns(*pair, self._context)
            if topk:
                columns |= topk_columns(*pair, stats, topk, self._context)
            return row.token_index, columns

        def forward_step(rows: Iterator[StudentRow], model: Any) -> tuple[Tensor, Any]:
            row = next(rows)
            hidden = forward_row(model, row)

            def collect(output: Tensor, non_loss_data: bool = True) -> Any:
                return measure(
                    response_rows(output, row, self.model.groups, self._sequence_parallel).detach(), row
                )

            return hidden, collect

        self.model.module.eval()
        with torch.no_grad():
            outputs = run_rows(
                self.model.module, self.model.groups, self._rows(plan, scores), forward_step, train=False
            )
        return self._share(plan, outputs, names)

    def train_step(self, plan: StepPlan, scores: Scores | None, coefficients: Coefficients) -> Update:
        """Forward, loss and backward of all microbatches, gradient reduction and optimizer step (a collective)."""
        weights = (coefficients.weights / coefficients.normalizer).to(self.device)
        # The one copy that tells the host which tokens take part; NaN does.
        weighted = (weights != 0).cpu()
        if not self._has_teacher and bool(weighted[:, [Term.FORWARD_KL, Term.REVERSE_KL]].any()):
            raise ValueError("a coefficient of a divergence, in a run without a teacher")
        groups = self.model.groups

        def forward_step(rows: Iterator[StudentRow], model: Any) -> tuple[Tensor, Any]:
            row = next(rows)
            hidden = forward_row(model, row)

            def loss(output: Tensor) -> tuple[Tensor, Tensor, Any]:
                active = present(row.active)
                result = token_loss(
                    response_rows(output, row, groups, self._sequence_parallel),
                    self.model.module.output_weight(),
                    self._teacher_of(row),
                    row.labels,
                    weights[row.token_index],
                    active,
                    coefficients.divergence,
                    self._context,
                    teacher_argmax=coefficients.teacher_argmax,
                )
                measured = (row.token_index.index_select(0, active.loss), result.columns)
                # The second item is Megatron's token count; the loss is already normalised.
                no_count = torch.zeros((), dtype=torch.int, device=self.device)
                return result.loss, no_count, (result.loss.detach(), measured)

            return hidden, loss

        self.model.module.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = self._rows(plan, scores, weighted, coefficients.divergence)
        outputs = run_rows(self.ddp, groups, rows, forward_step, train=True)
        total = self._global_loss([value for value, _ in outputs])
        names = measured_by(
            coefficients.divergence,
            has_teacher=self._has_teacher,
            teacher_argmax=coefficients.teacher_argmax,
        )
        columns = self._share(plan, [measured for _, measured in outputs], names)
        loss = float(total)
        result = self.optimizer.step(loss_is_finite=math.isfinite(loss))
        active = (coefficients.weights != 0).any(-1)
        return Update(loss, result.applied, result.grad_norm, result.lr, active, columns)

    def _rows(
        self,
        plan: StepPlan,
        scores: Scores | None,
        weighted: Tensor | None = None,
        divergence: Divergence | None = None,
    ) -> list[StudentRow]:
        """This replica's rollouts, on the device; a row holds those of one teacher, whose output layer its loss takes.

        `weighted`: bool [N, 4] on the CPU, where the coefficients of an update are not 0.
        """
        mine = plan.student[self.model.groups.dp_rank]
        lengths = {i: plan.rollouts[i].length for i in mine}
        rows = []
        for teacher in sorted({plan.teacher_of[i] for i in mine}):
            own = [i for i in mine if plan.teacher_of[i] == teacher]
            rows += pack_rows(lengths, own, self._max_tokens, self._packing)
        return [
            self._row(
                build_row(row, plan.rollouts, plan.offsets, self.model.row_multiple),
                scores,
                weighted,
                divergence,
            )
            for row in rows
        ]

    def _row(
        self,
        row: PackedRow,
        scores: Scores | None,
        weighted: Tensor | None,
        divergence: Divergence | None,
    ) -> StudentRow:
        check_labels(row.labels, self.shard.valid)
        return StudentRow(
            **vars(row_to_device(row, self.device)),
            teacher=None if scores is None else scores.rows(row.token_index),
            active=None
            if weighted is None
            else ActiveRows.of(weighted[row.token_index], divergence, self.device),
        )

    def _own_statistics(self, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`OF_STUDENT` of a row, by one pass over the output layer."""
        weight = self.model.module.output_weight().detach()
        stats = one_model_statistics(hidden, weight, 0, None, self._context, labels)
        return {"student_entropy": stats.entropy, "student_logprob": stats.logprob}

    def _teacher_of(self, row: StudentRow) -> tuple[Tensor, Tensor] | None:
        if not self._has_teacher:
            return None
        if row.teacher is None:
            raise RuntimeError("the loss was asked for on a rank that holds no output layer")
        return row.teacher.take(self.device)

    def _share(
        self, plan: StepPlan, outputs: list[tuple[Tensor, dict[str, Tensor]]], names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        token_index = torch.cat([index for index, _ in outputs]) if outputs else None
        measured = {name: torch.cat([columns[name] for _, columns in outputs]) for name in names if outputs}
        return share_columns(names, measured, token_index, plan.num_tokens, self.model.groups, self.device)

    def _global_loss(self, values: list[Tensor]) -> Tensor:
        """The loss of the global batch, float64, equal on all ranks (a collective over the world)."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.is_scorer and self.model.groups.tp_rank == 0:
            for value in values:
                total += value.double()
        dist.all_reduce(total)
        return total


def _finalize_without_averaging(
    model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any
) -> None:
    """Megatron would divide the gradients by its token count; ours are normalised by the objective."""
    finalize_model_grads(model, None, **kwargs)
