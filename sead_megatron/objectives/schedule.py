"""Schedules over the optimizer steps of a run."""

from __future__ import annotations

import math


def cosine_annealing(step: int, total_steps: int, start: float, end: float) -> float:
    """SEAD's alpha (arXiv 2606.28562, Eq. 7): ``end + (start - end) / 2 * (1 + cos(pi * step /
    total_steps))``.

    ``step`` is the zero-based index of the update, 0 .. T-1 for T updates, so the first update uses ``start``
    exactly. ``end`` is the value *after* the last update, at ``step == T``: with alpha 0.8 -> 0 and T = 181
    the last update still has alpha 6e-5. (The paper's Algorithm 1 counts from 1, which would shift the
    schedule by one step.)

    Raises ValueError when ``total_steps`` is not positive or ``step`` is outside ``[0, total_steps]``.
    """
    if total_steps <= 0:
        raise ValueError(f"total_steps must be positive, got {total_steps}")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be in [0, {total_steps}], got {step}")
    return end + (start - end) / 2 * (1 + math.cos(math.pi * step / total_steps))
