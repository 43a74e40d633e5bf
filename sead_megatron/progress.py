"""What rank 0 shows while a run trains, and the clock of its phases.

On a terminal one line is kept up to date; elsewhere (a log file, a batch job) each step prints one line.
Both go to stderr.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sead_megatron.metrics import OTHER, PHASES


class Progress:
    """Times the phases of a step and, when `enabled` (rank 0), shows where the run is.

        with Progress(config.steps, enabled=rank == 0) as progress:
            for step in ...:
                with progress.phase("rollout"):
                    ...
                record = {"step": step, ...} | progress.take_times()
                progress.finish_step(record)

    `done` is the step that training continues after (0 for a new run): the estimate of the remaining time
    uses only the steps of this process. `synchronise` waits until the device has done what was asked of it: on a
    GPU, where calls return at once, a phase would otherwise end before its work.
    """

    def __init__(
        self,
        steps: int,
        *,
        enabled: bool,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
        synchronise: Callable[[], None] | None = None,
    ) -> None:
        self._steps = steps
        self._enabled = enabled
        self._done = self._done_before = done
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._synchronise = synchronise
        self._started = self._step_started = clock()
        self._phase: str | None = None
        self._status = "starting"
        self._times: dict[str, float] = {}
        self._record: dict[str, Any] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=1, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step, one of `PHASES`, until the device is done. The same twice in a step adds up.

        Raises ValueError for an unknown name and RuntimeError inside another phase: seconds would count
        twice.
        """
        if name not in PHASES or name == OTHER:
            raise ValueError(f"unknown phase {name!r}: add time/{name} to sead_megatron/metrics.py")
        if self._phase is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self._phase!r}")
        self._phase = name
        started = self._clock()
        try:
            yield
            # Not after an error: the device may never be done.
            if self._synchronise is not None:
                self._synchronise()
        finally:
            key = f"time/{name}"
            self._times[key] = self._times.get(key, 0.0) + self._clock() - started
            self._phase = None

    def take_times(self) -> dict[str, float]:
        """Seconds since the last call, by metric key: of the phases (`time/rollout`), of all (`time/step`), the rest.

        A step lasts from one call to the next, so that no second is in none and none in two.
        """
        now = self._clock()
        step, self._step_started = now - self._step_started, now
        times, self._times = self._times, {}
        return times | {f"time/{OTHER}": max(step - sum(times.values()), 0.0), "time/step": step}

    def status(self, text: str) -> None:
        """Say what happens outside the phases: loading a model, compiling."""
        self._status = text
        if self._enabled and self._live is None:
            self._console.print(Text(text), soft_wrap=True)

    def start_training(self) -> None:
        """Start the clocks of the first step and of the remaining time: loading is over.

        Phases that were timed before, those of an evaluation of the initial student, are the first step's.
        """
        self._started = self._clock()
        self._step_started = self._started - sum(self._times.values())
        self._status = "between phases"

    def finish_step(self, record: Mapping[str, Any]) -> None:
        """Show a finished step; `record` is what goes to metrics.jsonl."""
        self._done = int(record["step"])
        # An evaluation is not in every record; the last one stays on display.
        kept = {key: value for key, value in self._record.items() if key == "evaluation/accuracy"}
        self._record = kept | dict(record)
        if self._enabled and self._live is None:
            self._console.print(Text("  ".join(self._parts(record))), soft_wrap=True)

    def _eta_seconds(self) -> float | None:
        here = self._done - self._done_before
        if here <= 0:
            return None
        return (self._clock() - self._started) / here * (self._steps - self._done)

    def _parts(self, record: Mapping[str, Any]) -> list[str]:
        parts = [f"step {self._done}/{self._steps}"]
        for key, form in (
            ("loss", "loss {:.4f}"),
            ("entropy/student", "H_s {:.3f}"),
            ("entropy/teacher", "H_t {:.3f}"),
        ):
            if key in record:
                parts.append(form.format(record[key]))
        zones = [
            f"{zone.upper()} {record[key]:.0%}" for zone in "abc" if (key := f"zone/{zone}_share") in record
        ]
        if zones:
            parts.append("zones " + " ".join(zones))
        for key, form in (
            ("time/step", "{:,.1f} s"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
            ("evaluation/accuracy", "accuracy {:.1%}"),
        ):
            if key in record:
                parts.append(form.format(record[key]))
        eta = self._eta_seconds()
        if eta is not None:
            parts.append(f"ETA {duration(eta)}")
        return parts

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        running = self._done + 1 if self._phase else self._done
        now = f"step {running}: {self._phase}" if self._phase else self._status
        grid.add_row(Text(now, style="bold"), Text("  ".join(self._parts(self._record))))
        return grid


def duration(seconds: float) -> str:
    """`3725` -> `1:02:05`, `65` -> `1:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
