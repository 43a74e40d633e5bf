"""The frozen teacher: scores rollouts and hands its hidden states to the student ranks that need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sead_kernels.split_kl import TileOptions, VocabShard, finalize_entropy, linear_entropy, merge_tp
from torch import Tensor

from sead_megatron.data.packing import PackedRow, build_row, pack_rows
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.build import BuiltModel, HiddenStateModel
from sead_megatron.parallel.groups import ParallelGroups
from sead_megatron.parallel.layout import Layout
from sead_megatron.training.device_rows import TeacherRows, row_to_device, to_device
from sead_megatron.training.pipeline import forward_row, response_rows, run_rows
from sead_megatron.training.step_plan import Scoring, StepPlan


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """What a student rank of the last stage holds of a teacher for those of its own rollouts that it scored.

    Attributes:
        hidden: [n, H_t], after the teacher's final norm, in the order of `token_index`.
        token_index: int64 [n] on the CPU, ascending indices into the TokenTable.
        output: the teacher's output layer in the student's vocabulary partition, [padded vocabulary / TP, H_t].
    """

    hidden: Tensor
    token_index: Tensor
    output: Tensor

    def holds(self, token_index: Tensor) -> bool:
        """Whether all of these tokens are among the scored ones."""
        return bool(torch.isin(token_index, self.token_index).all())

    def rows(self, token_index: Tensor) -> TeacherRows:
        """What the loss reads for some of this rank's tokens."""
        position = torch.searchsorted(self.token_index, token_index)
        return TeacherRows(self.hidden, to_device(position, self.hidden.device), self.output)


class Teacher:
    """A frozen Megatron model in its own layout over the student's ranks."""

    def __init__(
        self,
        model: BuiltModel,
        output: Tensor | None,
        student_groups: ParallelGroups,
        *,
        device: torch.device,
        sequence_parallel: bool,
        max_tokens: int,
        packing: bool,
        offload_hidden: bool = False,
    ) -> None:
        self._model = model
        self.output = output
        """The output layer in the student's vocabulary partition; None off the student's last stage."""
        self._student = student_groups
        self._device = device
        self._sequence_parallel = sequence_parallel
        self._max_tokens = max_tokens
        self._packing = packing
        self._keep_on = torch.device("cpu") if offload_hidden else device

    @property
    def layout(self) -> Layout:
        """The teacher's layout over the world."""
        return self._model.groups.layout

    @property
    def config(self) -> HFConfig:
        """The teacher's architecture."""
        return self._model.config

    @property
    def module(self) -> HiddenStateModel:
        """This rank's shard, without an output layer."""
        return self._model.module

    def score(self, plan: StepPlan, rollouts: Sequence[int]) -> TeacherScores | None:
        """Hidden states of those of `rollouts` (ascending, maybe none) that this rank trains on.

        None on ranks that hold no part of the student's output layer. A collective over the block that both models'
        replicas share.
        """
        scoring = plan.scoring(rollouts, self.layout)
        produced = self._forward(plan, scoring.frozen[self._model.groups.dp_rank])
        return self._exchange(plan, scoring, produced)

    @torch.no_grad()
    def _forward(self, plan: StepPlan, rollouts: Sequence[int]) -> Tensor | None:
        """Hidden states [n, H_t] of the response tokens of `rollouts` in table order, on the teacher's last stage."""
        groups = self._model.groups
        lengths = {i: plan.teacher_rollouts[i].length for i in rollouts}
        rows = [
            build_row(row, plan.teacher_rollouts, plan.offsets, self._model.row_multiple)
            for row in pack_rows(lengths, rollouts, self._max_tokens, self._packing)
        ]
        token_index = plan.token_indices(rollouts)
        places = [to_device(torch.searchsorted(token_index, row.token_index), self._keep_on) for row in rows]
        sent = [row_to_device(row, self._device) for row in rows]
        outputs = run_rows(self._model.module, groups, sent, self._forward_step, train=False) if rows else []
        if not groups.is_last_stage:
            return None
        hidden = torch.empty(
            len(token_index), self._model.config.hidden_size, dtype=self._dtype, device=self._keep_on
        )
        for place, output in zip(places, outputs, strict=True):
            hidden[place] = output
        return hidden

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._model.module.parameters()).dtype

    def _forward_step(self, rows: Iterator[PackedRow], model: Any) -> tuple[Tensor, Any]:
        row = next(rows)
        hidden = forward_row(model, row)

        def collect(output: Tensor, non_loss_data: bool = True) -> Tensor:
            selected = response_rows(output, row, self._model.groups, self._sequence_parallel)
            return selected.to(self._keep_on)

        return hidden, collect

    def _exchange(self, plan: StepPlan, scoring: Scoring, produced: Tensor | None) -> TeacherScores | None:
        """Moves hidden states from the teacher's last stage to the last stages of the student replicas it serves."""
        rank = dist.get_rank()
        received: TeacherScores | None = None
        operations: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for transfer in self._transfers(plan, scoring):
            if rank == transfer.target and received is None:
                received = self._room_for(plan.token_indices(scoring.student[self._student.dp_rank]))
            if not len(transfer.token_index):
                continue
            outgoing = None
            if rank == transfer.source:
                if produced is None:
                    raise RuntimeError("a rank without the teacher's last stage was asked for its output")
                scored = plan.token_indices(scoring.frozen[self._model.groups.dp_rank])
                position = torch.searchsorted(scored, transfer.token_index)
                outgoing = produced.index_select(0, to_device(position, self._keep_on))
            if rank == transfer.target and received is not None:
                position = torch.searchsorted(received.token_index, transfer.token_index)
                place = to_device(position, self._keep_on)
                if outgoing is not None:
                    received.hidden[place] = outgoing
                    continue
                buffer = torch.empty(
                    len(place), received.hidden.shape[1], dtype=self._dtype, device=self._device
                )
                operations.append(dist.P2POp(dist.irecv, buffer, transfer.source))
                arriving.append((place, buffer))
            elif outgoing is not None:
                operations.append(dist.P2POp(dist.isend, outgoing.to(self._device), transfer.target))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        for place, buffer in arriving:
            if received is None:
                raise RuntimeError("hidden states arrived on a rank that expects none")
            received.hidden[place] = buffer.to(self._keep_on)
        return received

    def _room_for(self, token_index: Tensor) -> TeacherScores:
        """Scores to be filled in."""
        if self.output is None:
            raise RuntimeError("hidden states are sent to a rank that holds no output layer")
        shape = (len(token_index), self._model.config.hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._keep_on)
        return TeacherScores(hidden, token_index, self.output)

    def _transfers(self, plan: StepPlan, scoring: Scoring) -> Iterator[_Transfer]:
        """Every message inside this rank's block, in the same order on all its ranks.

        Each of a student replica's last-stage ranks is served by one of the teacher's last-stage TP ranks, in turn.
        """
        student, teacher = self._student.layout, self._model.groups.layout
        block = max(student.block_size, teacher.block_size)
        first = dist.get_rank() // block * block
        for student_replica in range(first // student.block_size, (first + block) // student.block_size):
            targets = _last_stage_ranks(student, student_replica)
            wanted = set(scoring.student[student_replica])
            for teacher_replica in range(first // teacher.block_size, (first + block) // teacher.block_size):
                sources = _last_stage_ranks(teacher, teacher_replica)
                shared = [i for i in scoring.frozen[teacher_replica] if i in wanted]
                token_index = plan.token_indices(shared)
                for i, target in enumerate(targets):
                    yield _Transfer(sources[i % len(sources)], target, token_index)


@dataclass(frozen=True, eq=False)
class _Transfer:
    """Hidden states of some tokens, from one rank to another."""

    source: int
    target: int
    token_index: Tensor


def _last_stage_ranks(layout: Layout, replica: int) -> list[int]:
    first = (replica * layout.pipeline + layout.pipeline - 1) * layout.tensor
    return list(range(first, first + layout.tensor))


def teacher_columns(topk: int) -> tuple[str, ...]:
    """What `teacher_statistics` measures: the entropy, of a top-k one by how much the exact one can exceed it, and the
    logprob of the sampled token."""
    entropy = ("teacher_entropy", "teacher_entropy_slack") if topk else ("teacher_entropy",)
    return (*entropy, "teacher_logprob")


def teacher_statistics(
    scores: TeacherScores,
    labels: Tensor,
    groups: ParallelGroups,
    shard: VocabShard,
    *,
    temperature: float,
    topk: int,
    options: TileOptions,
    chunk: int = 16384,
) -> dict[str, Tensor]:
    """The `teacher_columns` of every token of `scores`, float32 [n], nats; equal on all TP ranks.

    `labels`: int64 [n] on the CPU, the sampled tokens. `topk > 0` gives the entropy of the k most likely tokens and a
    tail bucket, a lower bound of the exact one.
    """
    names = teacher_columns(topk)
    output_shard = scores.output
    chunks: dict[str, list[Tensor]] = {name: [torch.empty(0, device=output_shard.device)] for name in names}
    labels = to_device(labels, output_shard.device)
    for start in range(0, len(scores.token_index), chunk):
        hidden = scores.hidden[start : start + chunk].to(output_shard.device)
        sampled = labels[start : start + chunk]
        state = linear_entropy(
            hidden, output_shard, sampled, shard=shard, temperature=temperature, topk=topk, options=options
        )
        stats = finalize_entropy(merge_tp(state, groups.collection.tp), shard.valid)
        entropy = (stats.topk_entropy, stats.topk_slack) if topk else (stats.entropy,)
        for name, value in zip(names, (*entropy, stats.logprob), strict=True):
            chunks[name].append(value.float())
    return {name: torch.cat(parts) for name, parts in chunks.items()}
