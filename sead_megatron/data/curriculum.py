"""Which prompts a step takes: easy to hard (SEAD, arXiv 2606.28562, section 2.5 and App. B.2), or uniform.

Batches are a function of (seed, step), with one numpy generator for each pass or step, so a curriculum needs
no generator state: asking for the same step again, in this process or after a restart from an older
checkpoint, gives the same batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sead_megatron.errors import UserError

if TYPE_CHECKING:
    from sead_megatron.config.schema import CurriculumConfig

# Absorbs rounding when a difficulty such as 1 - 0.3 meets a competence that equals it on paper.
_COMPETENCE_TOLERANCE = 1e-9


class Curriculum(Protocol):
    """Chooses the prompts of each step.

    ``metrics`` describes the last batch: ``curriculum/eligible``, the number of prompts at or below the
    curriculum's frontier in this step, and ``curriculum/difficulty_mean`` of the batch when difficulties are
    known.
    """

    metrics: dict[str, float]

    def next_batch(self, step: int) -> list[int]:
        """Prompt indices of zero-based ``step``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, after the batch returned last; numbers, strings and lists of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of another curriculum or of another number of prompts."""
        ...


class _Passes(ABC):
    """Passes over all prompts without replacement, each in its own order; a batch may span two passes.

    The state holds the order of the pass in progress, because the same seed need not give the same order
    under another numpy version or after the difficulties were estimated anew, and the position, so that a run
    resumed with another batch size goes on where it stopped.
    """

    name: str

    def __init__(
        self, num_prompts: int, prompts_per_step: int, seed: int, difficulties: npt.NDArray[np.float64] | None
    ) -> None:
        self._num_prompts = num_prompts
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._difficulties = difficulties
        self._step, self._cursor = 0, 0  # the step to come and its first position, counted over all passes
        self._orders: dict[int, list[int]] = {}
        self.metrics: dict[str, float] = {}

    @abstractmethod
    def _order(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """The order of one pass."""

    @abstractmethod
    def _eligible(self, last: int) -> int:
        """``curriculum/eligible`` when the batch ends at position ``last`` of its pass."""

    def _pass(self, index: int) -> list[int]:
        if index not in self._orders:
            self._orders[index] = self._order(np.random.default_rng([self._seed, index])).tolist()
        return self._orders[index]

    def next_batch(self, step: int) -> list[int]:
        start = self._cursor + (step - self._step) * self._prompts_per_step
        if start < 0:
            raise ValueError(f"step {step} lies before the first batch of this curriculum")
        stop = start + self._prompts_per_step
        batch = [self._pass(at // self._num_prompts)[at % self._num_prompts] for at in range(start, stop)]
        self._step, self._cursor = step + 1, stop
        first, last = start // self._num_prompts, (stop - 1) // self._num_prompts
        self._orders = {index: order for index, order in self._orders.items() if first <= index <= last}
        eligible = self._eligible((stop - 1) % self._num_prompts)
        self.metrics = _batch_metrics(batch, self._difficulties, eligible)
        return batch

    def state_dict(self) -> dict[str, Any]:
        index = self._cursor // self._num_prompts
        return {
            "name": self.name,
            "num_prompts": self._num_prompts,
            "step": self._step,
            "cursor": self._cursor,
            "order": list(self._pass(index)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self.name, self._num_prompts)
        self._step, self._cursor = state["step"], state["cursor"]
        self._orders = {self._cursor // self._num_prompts: list(state["order"])}


class SortedNoise(_Passes):
    """App. B.2, what the paper ran: a single pass, sorted by ``d + N(0, sigma^2)``, ascending.

    A run that needs more prompts than there are starts over at the easy end with new noise; a run that needs
    fewer ends before the hardest. With pass rates of 8 rollouts d has 9 values 0.125 apart, and sigma 0.02
    only shuffles within them.
    """

    name = "sorted_noise"

    def __init__(
        self,
        num_prompts: int,
        prompts_per_step: int,
        seed: int,
        difficulties: npt.NDArray[np.float64],
        sigma: float,
    ) -> None:
        super().__init__(num_prompts, prompts_per_step, seed, difficulties)
        self._sorted_by = difficulties
        self._sigma = sigma

    def _order(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        noise = generator.normal(0.0, self._sigma, self._num_prompts)
        return np.argsort(self._sorted_by + noise, kind="stable")

    def _eligible(self, last: int) -> int:
        return last + 1


class Uniform(_Passes):
    """Shuffled passes over all prompts: the paper's runs without curriculum."""

    name = "uniform"

    def _order(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        return generator.permutation(self._num_prompts)

    def _eligible(self, last: int) -> int:
        return self._num_prompts


class Competence:
    """Section 2.5 and Algorithm 1: a uniform batch from ``D(s) = {d <= c(s)}``.

    ``c(s) = min(1, c0 * (1 + s/T)^p)`` is the competence at zero-based step s of T. Sampling is without
    replacement inside a batch, with replacement between batches. When D(s) is smaller than a batch the
    easiest of the remaining prompts fill it, counted in ``curriculum/filled``. c0 and p are not published; c
    reaches 1 within the run only if ``c0 * 2^p > 1``, so with the defaults 0.5 and 1 prompts the student
    never solves (d = 1) are not trained on.
    """

    name = "competence"

    def __init__(
        self,
        num_prompts: int,
        prompts_per_step: int,
        seed: int,
        difficulties: npt.NDArray[np.float64],
        steps: int,
        c0: float,
        power: float,
    ) -> None:
        self._num_prompts = num_prompts
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._difficulties = difficulties
        self._steps, self._c0, self._power = steps, c0, power
        self._easiest_first = np.argsort(difficulties, kind="stable")
        self.metrics: dict[str, float] = {}

    def competence(self, step: int) -> float:
        """c(s), the largest difficulty that is trained on in this step."""
        grown: float = self._c0 * (1 + step / self._steps) ** self._power
        return min(1.0, grown)

    def next_batch(self, step: int) -> list[int]:
        frontier = self.competence(step) + _COMPETENCE_TOLERANCE
        eligible = int((self._difficulties <= frontier).sum())
        drawn = min(eligible, self._prompts_per_step)
        positions = np.random.default_rng([self._seed, step]).permutation(eligible)[:drawn]
        filled = self._prompts_per_step - drawn
        fill = np.arange(eligible, eligible + filled)
        batch: list[int] = self._easiest_first[np.concatenate([positions, fill])].tolist()
        self.metrics = _batch_metrics(batch, self._difficulties, eligible) | {
            "curriculum/filled": float(filled)
        }
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "num_prompts": self._num_prompts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self.name, self._num_prompts)


def _check_state(state: dict[str, Any], name: str, num_prompts: int) -> None:
    saved_name, saved_prompts = state["name"], state["num_prompts"]
    if (saved_name, saved_prompts) != (name, num_prompts):
        raise UserError(
            "curriculum",
            f"{name} over {num_prompts} prompts",
            f"the checkpoint was written with {saved_name} over {saved_prompts} prompts",
            "resume with that curriculum and those prompts, or start a new run_dir",
        )


def _batch_metrics(
    batch: list[int], difficulties: npt.NDArray[np.float64] | None, eligible: int
) -> dict[str, float]:
    metrics = {"curriculum/eligible": float(eligible)}
    if difficulties is not None:
        metrics["curriculum/difficulty_mean"] = float(difficulties[batch].mean())
    return metrics


def _checked_difficulties(
    config: CurriculumConfig, difficulties: Sequence[float] | None, num_prompts: int
) -> npt.NDArray[np.float64] | None:
    if difficulties is None:
        if config.name != "uniform":
            raise UserError(
                "curriculum.difficulty",
                None,
                f"curriculum {config.name} orders prompts by their difficulty, and there are no difficulties",
                "name a difficulty file, or use curriculum.name: uniform",
            )
        return None
    values = np.asarray(difficulties, dtype=np.float64)
    if values.shape != (num_prompts,):
        raise ValueError(f"{values.shape} difficulties for {num_prompts} prompts")
    outside = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(outside):
        raise UserError(
            f"difficulty of prompt {outside[0]}",
            float(values[outside[0]]),
            "a difficulty is 1 - pass rate, in [0, 1]",
            "correct or re-estimate the difficulties",
        )
    return values


def build_curriculum(
    config: CurriculumConfig,
    difficulties: Sequence[float] | None,
    num_prompts: int,
    steps: int,
    prompts_per_step: int,
    seed: int,
) -> Curriculum:
    """The curriculum that ``config.name`` says.

    Args:
        config: the ``curriculum`` section.
        difficulties: 1 - pass rate of the initial student for each prompt; only ``uniform`` does without.
        num_prompts, steps, prompts_per_step: sizes of the prompt set, the run and a batch.
        seed: non-negative.

    Raises UserError when difficulties are missing or outside [0, 1], or when a batch is larger than the
    prompt set, and ValueError when their number is not ``num_prompts``.
    """
    if prompts_per_step > num_prompts:
        raise UserError(
            "data.prompts_per_step",
            prompts_per_step,
            f"a batch is drawn without replacement from {num_prompts} prompts",
            f"use at most {num_prompts} or add prompts",
        )
    values = _checked_difficulties(config, difficulties, num_prompts)
    if values is None or config.name == "uniform":
        return Uniform(num_prompts, prompts_per_step, seed, values)
    if config.name == "sorted_noise":
        return SortedNoise(num_prompts, prompts_per_step, seed, values, config.sigma)
    return Competence(num_prompts, prompts_per_step, seed, values, steps, config.c0, config.power)
