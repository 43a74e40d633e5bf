"""Which vocabulary entries a top-k loss sees: the teacher's top-k, the student's, their union or intersection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .entropy_state import EntropyStats
from .topk import NO_ID, in_row


class TopKTarget(NamedTuple):
    """K tokens, what the teacher gives them and how much is left: what of a teacher a top-k loss needs.

    Attributes:
        ids: int64 [T, K], distinct within a row but for ``topk.NO_ID``, an empty slot.
        logprobs: [T, K], normalised over the whole vocabulary; not read in empty slots.
        tail_mass: [T], the mass of all other tokens. 1 - sum(exp(logprobs)) only where nothing better is known.
    """

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor

    @classmethod
    def of(
        cls, teacher: EntropyStats, support: str = "teacher", student_ids: Tensor | None = None
    ) -> TopKTarget:
        """From ``linear_entropy(..., topk=K, gather_ids=student_ids)``, merged over ranks and finalised.

        Args:
            support: ``teacher``; ``student``; ``union``, the teacher's K slots and then those of the student, empty
                where the teacher has the id; ``intersection``, the teacher's K slots, empty where the student
                lacks the id. ``student`` needs no top-k of the teacher, the others but ``union`` nothing gathered.
            student_ids: int64 [T, K], the student's top-k; not read for ``teacher``.

        Raises:
            ValueError: naming what is missing.
        """
        if support == "teacher":
            return _own_topk(teacher)
        if student_ids is None:
            raise ValueError(f"student_ids is None, wanted the student's top-k for support {support!r}")
        if support == "student":
            return _at(teacher, student_ids)
        if support == "union":
            return _union(_own_topk(teacher), _at(teacher, student_ids))
        if support == "intersection":
            return _intersection(_own_topk(teacher), student_ids)
        raise ValueError(f"support is {support!r}, wanted one of {', '.join(SUPPORTS)}")


# Names of ``TopKTarget.of``.
SUPPORTS = ("teacher", "student", "union", "intersection")


def _own_topk(teacher: EntropyStats) -> TopKTarget:
    if teacher.topk_ids is None or teacher.topk_logprobs is None or teacher.tail_mass is None:
        raise ValueError("teacher has no top-k, wanted statistics of linear_entropy(..., topk=K) with K >= 1")
    return TopKTarget(teacher.topk_ids, teacher.topk_logprobs, teacher.tail_mass)


def _at(teacher: EntropyStats, ids: Tensor) -> TopKTarget:
    logprobs, tail_mass = teacher.support_logprobs, teacher.support_tail_mass
    if logprobs is None or tail_mass is None or logprobs.shape != ids.shape:
        got = None if logprobs is None else tuple(logprobs.shape)
        raise ValueError(
            f"teacher.support_logprobs has shape {got}, wanted {tuple(ids.shape)} like student_ids: pass "
            "gather_ids=student_ids to linear_entropy"
        )
    return TopKTarget(ids, logprobs, tail_mass)


def _union(own: TopKTarget, students: TopKTarget) -> TopKTarget:
    shared = in_row(students.ids, own.ids)
    added = students.logprobs.exp().masked_fill(shared, 0).sum(1)
    return TopKTarget(
        torch.cat([own.ids, students.ids.masked_fill(shared, NO_ID)], dim=1),
        torch.cat([own.logprobs, students.logprobs], dim=1),
        (own.tail_mass - added).clamp(min=0),
    )


def _intersection(own: TopKTarget, student_ids: Tensor) -> TopKTarget:
    dropped = ~in_row(own.ids, student_ids)
    removed = (own.logprobs.exp() * dropped).sum(1)
    return TopKTarget(own.ids.masked_fill(dropped, NO_ID), own.logprobs, own.tail_mass + removed)
