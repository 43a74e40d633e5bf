"""What a section found, written to its file at every step: a section that is killed leaves the numbers it had."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class SkippedError(Exception):
    """This section cannot run on this machine; the message says why."""


@dataclass
class Report:
    """Numbers and failures of a section."""

    path: Path
    numbers: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def number(self, name: str, value: Any) -> None:
        """Keeps a measurement (JSON data)."""
        self.numbers[name] = value
        self._write()

    def fail(self, text: str) -> None:
        """Notes a failure; the section goes on."""
        self.failures.append(text)
        self._write()

    def compare(self, name: str, error: float, tolerance: float) -> None:
        """Keeps a deviation and fails where it is above `tolerance`, or NaN."""
        verdict = "within" if error <= tolerance else "beyond"
        shown = error if math.isfinite(error) else str(error)
        self.number(name, {"error": shown, "tolerance": tolerance, "verdict": verdict})
        if verdict == "beyond":
            self.fail(f"{name}: {error:.3g} > {tolerance:g}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose exception is a failure of its own and does not end the section."""
        try:
            yield
        except Exception as error:  # a part boundary, as a process would be
            text = " ".join(str(error).split())
            self.fail(f"{name}: {type(error).__name__}: {text[:500]}")

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"numbers": self.numbers, "failures": self.failures}))
        os.replace(partial, self.path)


@dataclass(frozen=True)
class Context:
    """What a section is given. `directory`: shared by all sections of a run, removed afterwards."""

    device: torch.device
    directory: Path
    report: Report
    tiny: bool = False
    """Whether a GPU is given the CPU's sizes too."""

    @property
    def large(self) -> bool:
        """Whether the sizes are those of a GPU."""
        return self.device.type == "cuda" and not self.tiny


def relative_norm(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, in float64 on the CPU."""
    wanted = expected.detach().cpu().double()
    return float((actual.detach().cpu().double() - wanted).norm() / wanted.norm())


def largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected|, in float64 on the CPU; 0 for empty ones."""
    difference = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs()
    return float(difference.max()) if difference.numel() else 0.0
