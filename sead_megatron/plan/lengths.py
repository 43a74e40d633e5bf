"""Response lengths that a plan reckons with. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sead_megatron.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """A distribution of response lengths, tokens, cut at `longest` as sampling is."""

    median: float
    sigma: float
    """Of the logarithm."""
    longest: int
    measured: tuple[int, ...] = ()
    """Drawn from these, with replacement, instead of from the log-normal distribution."""

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """int64 [count], each at least 1."""
        if self.measured:
            drawn = generator.choice(np.asarray(self.measured), count)
        else:
            drawn = np.exp(generator.normal(np.log(self.median), self.sigma, count))
        return np.clip(drawn, 1, self.longest).astype(np.int64)

    def describe(self) -> str:
        """One clause for the list of assumptions."""
        if self.measured:
            return f"response lengths drawn from {len(self.measured)} measured ones, cut at {self.longest:,}"
        return (
            f"response lengths log-normal, median {self.median:,.0f} and sigma {self.sigma:g}, "
            f"cut at {self.longest:,}"
        )


def read_lengths(path: str | Path, longest: int) -> Lengths:
    """Lengths of a text file, one integer a line. UserError names the first line that is none."""
    try:
        lines = Path(path).read_text().split("\n")
    except OSError as error:
        raise UserError("--lengths", str(path), str(error.strerror), "give a readable file") from error
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not line.strip().isdecimal():
            raise UserError(
                f"{path}, line {number}", line, "must be a length in tokens", "write one integer a line"
            )
        values.append(int(line))
    if not values:
        raise UserError("--lengths", str(path), "holds no length", "write one integer a line")
    return Lengths(float(np.median(values)), 0.0, longest, tuple(values))
