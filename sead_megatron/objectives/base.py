"""What an objective is, and the metrics every objective logs."""

from __future__ import annotations

from typing import Any, Protocol

from sead_megatron.data.types import Coefficients, TokenTable


class Objective(Protocol):
    """Turns the statistics of the global batch's tokens into four coefficients a token.

    The trainer and the kernel know no method: zones, gates and schedules only change coefficients. An
    objective knows no layout: it sees the same table on every rank and must compute the same coefficients
    from it.
    """

    @property
    def needs_teacher_entropy(self) -> bool:
        """Whether ``coefficients`` reads ``teacher_entropy``."""
        ...

    @property
    def uses_trainer_entropy(self) -> bool:
        """Whether ``student_entropy`` must be the trainer's own measurement instead of the engine's."""
        ...

    @property
    def teacher_topk(self) -> int:
        """How ``teacher_entropy`` is measured: over the k likeliest tokens and a tail bucket; 0 is exact."""
        ...

    def needs_token_stats(self, step: int) -> bool:
        """Whether this step's coefficients need the trainer's statistics (entropies, KLs) of *every* token.

        They cost a forward-only pass of student and teacher heads before the update. Without it the table has
        the engine's student entropy and, if asked for, the teacher's entropy.
        """
        ...

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        """Coefficients for update ``step`` (0 .. steps - 1), detached.

        Raises ValueError when the table lacks a column the two methods above ask for.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs; numbers, strings, None and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when ``state`` is not of this objective."""
        ...


def token_metrics(table: TokenTable, active: int) -> dict[str, float]:
    """Counts, and means over all response tokens of the columns that are there.

    Means are in nats and taken in float64; a mean over no token is left out. ``active`` is the number of
    tokens in the objective's denominator.
    """
    metrics = {"tokens/active": float(active), "tokens/response": float(table.num_tokens)}
    names = {
        "entropy/student": table.student_entropy,
        "entropy/teacher": table.teacher_entropy,
        "entropy/teacher_slack": table.teacher_entropy_slack,
        "kl/forward": table.forward_kl,
        "kl/reverse": table.reverse_kl,
    }
    if table.num_tokens:
        metrics |= {
            name: float(column.double().mean()) for name, column in names.items() if column is not None
        }
    return metrics
