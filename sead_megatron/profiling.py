"""Profiles a few steps on some ranks, as named ranges: for Nsight Systems on a GPU, by torch's profiler on the CPU.

Ranges, from the outside in:

    step/3                 one optimizer step and everything that belongs to it
    update                 a phase, named as in `sead_megatron.metrics` (`time/update`)
    update/schedule        one pass of a Megatron schedule over all microbatches of this rank
    update/forward/0       a microbatch: this stage's layers and, on the last stage, the loss
    update/backward/0
    update/forward-recv/0  a message between pipeline stages: `forward-send-backward-recv` and so on, as Megatron
                           names them, with the number of the message of this kind
    update/all-grads-sync  what Megatron does to the gradients of the whole pass

Teacher and student differ by the phase: `teacher` is the teacher's forward pass, `stats` and `update` are the
student's. Ranges inside a phase come from Megatron's own hook, `config.timers`, which is set on profiled steps only.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sead_megatron.config import TrainConfig
from sead_megatron.config.schema import ProfileConfig
from sead_megatron.errors import UserError

log = logging.getLogger(__name__)

DIRECTORY = "profile"
"""Where traces go, in RUN_DIR."""

# Megatron's names of its timers and ours; the others keep theirs.
_NAMES = {"forward-backward": "schedule", "forward-compute": "forward", "backward-compute": "backward"}
# Megatron's level of the timers that run once a microbatch.
_MICROBATCH_LEVEL = 2


class Capture(Protocol):
    """Records ranges between `start` and `stop`. Ranges nest."""

    def start(self) -> None: ...

    def stop(self, first: int, end: int) -> None:
        """Ends the recording of the steps `first` <= step < `end`."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class NvtxCapture:
    """NVTX ranges between cudaProfilerStart and cudaProfilerStop: a profiler around the process keeps them.

    Writes nothing itself. Starts and stops when the GPU has finished all work that was given to it before.
    """

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    def stop(self, first: int, end: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def push(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def pop(self) -> None:
        torch.cuda.nvtx.range_pop()


class TraceCapture:
    """A trace by torch's profiler, in Chrome's JSON: `DIRECTORY/rank_R_steps_A_B.json.gz` of the steps A <= step < B.

    Raises UserError when the directory cannot be written, at once, and when a trace cannot.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._profiler: Any = None
        self._open: list[record_function] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise _not_written(directory, error) from error

    def start(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU])
        self._profiler.start()

    def stop(self, first: int, end: int) -> None:
        self._profiler.stop()
        path = self._directory / f"rank_{self._rank}_steps_{first}_{end}.json.gz"
        raw, packed = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("raw", "packed"))
        try:
            self._profiler.export_chrome_trace(str(raw))
            _check_complete(raw)
            with open(raw, "rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
            os.replace(packed, path)
        except OSError as error:
            raise _not_written(path, error) from error
        finally:
            self._profiler = None
            for temporary in (raw, packed):
                temporary.unlink(missing_ok=True)

    def push(self, name: str) -> None:
        record = record_function(name)
        record.__enter__()
        self._open.append(record)

    def pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


def _check_complete(trace: Path) -> None:
    """Raises OSError for a trace that stops in the middle: torch's writer says nothing about a full disk."""
    with open(trace, "rb") as file:
        file.seek(max(trace.stat().st_size - 4096, 0))
        tail = file.read().rstrip()
    # After the list of events only its name follows.
    if not tail.endswith(b"}") or tail.rfind(b"]") < tail.rfind(b"{"):
        raise OSError("the profiler's output ends in the middle; is the disk full?")


def _not_written(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        "profile",
        str(path),
        f"the trace cannot be written ({reason})",
        "make room or set its permissions, or set profile.start_step and profile.stop_step to 0",
    )


@dataclass(frozen=True)
class _Timer:
    """One of Megatron's timers. No barrier, whatever it asks for: that would change what is measured."""

    timers: MegatronTimers
    name: str
    each_microbatch: bool

    def start(self, barrier: bool = False) -> None:
        self.timers.start(self.name, self.each_microbatch)

    def stop(self, barrier: bool = False) -> None:
        self.timers.capture.pop()


class MegatronTimers:
    """What Megatron-core takes as `config.timers` and calls around its work: ranges in place of clocks.

    Megatron takes microbatches in order, forward and backward, so that the number of the call since the schedule
    began is the microbatch.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.phase = ""
        self._timers: dict[str, _Timer] = {}
        self._calls: dict[str, int] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """Megatron gives the level where it starts a timer, not where it stops it."""
        timer = self._timers.get(name)
        if timer is None:
            timer = _Timer(self, _NAMES.get(name, name), log_level == _MICROBATCH_LEVEL)
            self._timers[name] = timer
        return timer

    def start(self, name: str, each_microbatch: bool) -> None:
        """Opens the range of a timer."""
        if name == "schedule":
            self._calls.clear()
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        self.capture.push(f"{self.phase}/{name}/{number}" if each_microbatch else f"{self.phase}/{name}")


class Profile:
    """The profiled steps of this rank.

    profile.watch(student_config, teacher_config)
    for step in ...:
        with profile.step(step):
            with profile.phase("rollout"):
                ...
    """

    def __init__(self, config: ProfileConfig, capture: Capture) -> None:
        self._config = config
        self._capture = capture
        self._timers = MegatronTimers(capture)
        self._models: tuple[Any, ...] = ()
        self._first: int | None = None
        """First step of the running capture."""

    def watch(self, *models: Any) -> None:
        """Megatron configurations of the models whose schedules get ranges."""
        self._models = models

    def resume(self, done: int) -> None:
        """Says so when the steps to profile are all among the first `done`, which are not run again."""
        if done + 1 >= self._config.stop_step:
            log.warning(
                "profile: steps %d to %d were done before; nothing will be profiled",
                self._config.start_step,
                self._config.stop_step - 1,
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profiles the step (counted from 1) if it is to be; a run that continues inside the range starts there.

        Raises UserError when the trace cannot be written after the last one.
        """
        if not self._config.start_step <= step < self._config.stop_step:
            yield
            return
        if self._first is None:
            self._first = step
            self._capture.start()
            self._set_timers(self._timers)
        with self._range(f"step/{step}"):
            yield
        if step + 1 == self._config.stop_step:
            self._set_timers(None)
            first, self._first = self._first, None
            self._capture.stop(first, self._config.stop_step)

    @contextmanager
    def phase(self, name: str, timed: AbstractContextManager[None]) -> Iterator[None]:
        """`timed`; in a profiled step inside the range of the phase, which then ends when the device is done too."""
        if self._first is None:
            with timed:
                yield
            return
        self._timers.phase = name
        with self._range(name), timed:
            yield

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        self._capture.push(name)
        try:
            yield
        finally:
            self._capture.pop()

    def _set_timers(self, timers: MegatronTimers | None) -> None:
        for model in self._models:
            model.timers = timers


def build_profile(config: TrainConfig, rank: int) -> Profile | None:
    """None when profiling is off or not asked of this rank: nothing is then done at all. Raises UserError."""
    if not config.profile.enabled or rank not in config.profile.ranks:
        return None
    if config.device == "cuda":
        return Profile(config.profile, NvtxCapture())
    return Profile(config.profile, TraceCapture(Path(config.run_dir) / DIRECTORY, rank))
