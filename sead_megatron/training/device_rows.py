"""Packed rows on the device, sent there before a pass begins, so that no microbatch waits for one.

A copy from pageable memory waits until the device has done everything it was asked before; one from pinned memory
does not, and neither does the host when it knows what it would otherwise read back: labels, active rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sead_megatron.data.packing import PackedRow
from sead_megatron.data.terms import Divergence, Pointwise, Term


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for the device; the tensor itself where that is the CPU."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def row_to_device(row: PackedRow, device: torch.device) -> PackedRow:
    """The row with all of its tensors on `device`."""
    return replace(
        row,
        tokens=to_device(row.tokens, device),
        position_ids=to_device(row.position_ids, device),
        cu_seqlens=to_device(row.cu_seqlens, device),
        logit_rows=to_device(row.logit_rows, device),
        labels=to_device(row.labels, device),
        token_index=to_device(row.token_index, device),
    )


def check_labels(labels: Tensor, vocabulary: int) -> Tensor:
    """`labels`, int64 on the CPU. Raises ValueError for a token that the student's vocabulary does not hold."""
    if len(labels):
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"response tokens lie in [{low}, {high}], the vocabulary is [0, {vocabulary})")
    return labels


@dataclass(frozen=True, eq=False)
class ActiveRows:
    """Which of a row's response tokens take part in the loss.

    Attributes:
        loss: int64, ascending, those with a coefficient.
        divergence: those with a coefficient of a divergence.
    """

    loss: Tensor
    divergence: Tensor

    @classmethod
    def of(cls, weighted: Tensor, divergence: Divergence | None, device: torch.device) -> ActiveRows:
        """`weighted`: bool [R, 4] on the CPU, where the row's coefficients are not 0."""
        diverging = weighted[:, [Term.FORWARD_KL, Term.REVERSE_KL]].any(1)
        # A pointwise loss has one coefficient, in the first column.
        active = weighted[:, Term.FORWARD_KL] if isinstance(divergence, Pointwise) else weighted.any(1)
        return cls(*(to_device(rows.nonzero()[:, 0], device) for rows in (active, diverging)))


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """What a row's loss reads of its teacher.

    Attributes:
        hidden: [n, H_t], of all of the teacher's tokens on this rank.
        position: int64 [R], the row's among them, on the device of `hidden`.
        output: the teacher's output layer in the student's vocabulary partition.
    """

    hidden: Tensor
    position: Tensor
    output: Tensor

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states [R, H_t] on `device`, and the output layer."""
        rows = self.hidden.index_select(0, self.position)
        return (rows if rows.device == device else to_device(rows, device)), self.output


@dataclass(frozen=True, eq=False)
class StudentRow(PackedRow):
    """A packed row on the device, with what its loss needs beside the model; None where it computes none."""

    teacher: TeacherRows | None = None
    active: ActiveRows | None = None
