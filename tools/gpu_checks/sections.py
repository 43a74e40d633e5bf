"""Which sections there are, in order of value, and how the time is shared out. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """`share`: of the time that is left when it starts, relative to those that follow. `answers`: what it is for."""

    name: str
    share: float
    answers: str


# A section that ends early leaves its time to those after it, so the first ones may have generous shares.
SECTIONS = (
    Section("kernels", 3.0, "loss kernels against the float64 oracle"),
    Section("step", 2.0, "one training step, number for number as on the CPU"),
    Section("model", 3.0, "time, launches, synchronisations and memory of a 1B pair"),
    Section("speed", 2.0, "loss kernels: TFLOP/s, GB/s, memory against naive and peers"),
    Section("checkpoint", 1.5, "a checkpoint restores every bit"),
    Section("sanitizer", 2.0, "CUDA tiles under compute-sanitizer"),
)
NAMES = tuple(section.name for section in SECTIONS)


def seconds_for(section: Section, following: Sequence[Section], left: float) -> float:
    """Of `left` seconds, those that a section may take while each of `following` keeps its share."""
    return left * section.share / (section.share + sum(other.share for other in following))
