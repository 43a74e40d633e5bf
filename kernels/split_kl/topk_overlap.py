"""How far the top-k lists of student and teacher agree, and whether the teacher tells the student's apart; logging."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .topk import NO_ID, in_row


def topk_overlap(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Share [T] of the student's top-k ids [T, K] that are in the teacher's [T, K']: ``overlap@k`` of arXiv 2604.13016.

    Float32. Both lists without empty slots.
    """
    return in_row(student_ids, teacher_ids).float().mean(1)


def support_mass(ids: Tensor, logprobs: Tensor) -> Tensor:
    """Mass [T] of ``ids`` [T, K] under the model of ``logprobs`` [T, K]; slots of ``topk.NO_ID`` count nothing.

    The student's on the teacher's top-k or the teacher's on the student's, from gathered log-probabilities.
    """
    return logprobs.exp().masked_fill(ids == NO_ID, 0).sum(1)


def teachability_margin(
    student_logprobs: Tensor, teacher_logprobs: Tensor, kind: Literal["second", "mean"] = "second"
) -> Tensor:
    """How strongly the teacher prefers one of the student's top-k tokens to the others [T], nats.

    With a_v = ln q_v - ln p_v on the student's top-k: the largest a_v less the second largest, or less their mean.
    A reconstruction: arXiv 2605.13643 describes the margin, its formula could not be read.

    Args:
        student_logprobs, teacher_logprobs: [T, K] of the same ids, K >= 2.

    Raises:
        ValueError: shapes differ, K is 1, or no such kind.
    """
    if student_logprobs.shape != teacher_logprobs.shape or student_logprobs.shape[1] < 2:
        raise ValueError(
            f"teacher_logprobs has shape {tuple(teacher_logprobs.shape)}, wanted "
            f"{tuple(student_logprobs.shape)} like student_logprobs, with two columns or more"
        )
    advantage = teacher_logprobs - student_logprobs
    if kind == "second":
        first, second = advantage.topk(2, dim=1).values.unbind(1)
        return first - second
    if kind == "mean":
        return advantage.amax(1) - advantage.mean(1)
    raise ValueError(f"kind is {kind!r}, wanted second or mean")
