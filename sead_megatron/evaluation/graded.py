"""One problem's graded responses, and what they add up to. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Graded:
    """One problem's responses; the lists have one entry a sample."""

    id: str
    answer: str
    correct: list[bool]
    lengths: list[int]
    """Response tokens, the stop token included."""
    finished: list[bool]
    """False where the response was cut by `max_new_tokens`."""
    empty: list[bool]
    """True where the response has no text."""
    responses: list[str] | None = None

    def line(self) -> str:
        """As JSON, without what was not kept."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}) + "\n"


def summary(records: Sequence[Graded]) -> dict[str, Any]:
    """Of a benchmark's problems (at least one): `score` is the share of right responses, `length_mean` their mean
    length in tokens, `truncated` the share that was cut, `empty` the number without text."""
    responses = sum(len(record.correct) for record in records)
    correct = sum(sum(record.correct) for record in records)
    return {
        "problems": len(records),
        "samples": len(records[0].correct),
        "correct": correct,
        "score": correct / responses,
        "truncated": 1 - sum(sum(record.finished) for record in records) / responses,
        "length_mean": sum(sum(record.lengths) for record in records) / responses,
        "empty": sum(sum(record.empty) for record in records),
    }
