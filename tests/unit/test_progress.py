"""The clock of the phases, the line of a step, and the live display."""

import io

import pytest
from rich.console import Console

from sead_megatron.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    clock: Clock, *, terminal: bool = False, enabled: bool = True, done: int = 0
) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    return Progress(8, enabled=enabled, done=done, console=console, clock=clock), out


RECORD = {
    "step": 3,
    "loss": 0.12345,
    "entropy/student": 1.5,
    "entropy/teacher": 0.75,
    "zone/a_share": 0.5,
    "zone/b_share": 0.4,
    "zone/c_share": 0.1,
    "time/step": 2.25,
    "tokens_per_second": 1234.5,
}


@pytest.mark.parametrize("enabled", [True, False])
def test_phases_add_up_and_are_taken_once(enabled: bool) -> None:
    clock = Clock()
    progress, _ = make(clock, enabled=enabled)
    for seconds in (1.5, 0.25):
        with progress.phase("rollout"):
            clock.now += seconds
    with pytest.raises(KeyError), progress.phase("update"):
        clock.now += 2.0
        raise KeyError
    clock.now += 0.5
    assert progress.take_times() == {
        "time/rollout": 1.75,
        "time/update": 2.0,
        "time/other": 0.5,
        "time/step": 4.25,
    }
    clock.now += 3.0
    assert progress.take_times() == {"time/other": 3.0, "time/step": 3.0}


def test_a_phase_before_the_first_step_is_the_first_steps() -> None:
    """Loading is not: the evaluation of the initial student is."""
    clock = Clock()
    progress, _ = make(clock)
    clock.now += 1000.0
    with progress.phase("evaluation"):
        clock.now += 7.0
    clock.now += 20.0
    progress.start_training()
    clock.now += 1.0
    assert progress.take_times() == {"time/evaluation": 7.0, "time/other": 1.0, "time/step": 8.0}


def test_a_phase_ends_when_the_device_is_done() -> None:
    """The device is asked inside the phase's seconds, once, and not where the phase failed."""
    clock = Clock()
    asked = []

    def synchronise() -> None:
        asked.append(clock.now)
        clock.now += 4.0

    progress = Progress(8, enabled=False, clock=clock, synchronise=synchronise)
    with progress.phase("teacher"):
        clock.now += 1.0
    with pytest.raises(KeyError), progress.phase("update"):
        raise KeyError
    times = progress.take_times()
    assert (times["time/teacher"], times["time/update"], asked) == (5.0, 0.0, [101.0])


def test_nested_and_unknown_phases_are_refused() -> None:
    progress, _ = make(Clock())
    with (
        progress.phase("rollout"),
        pytest.raises(RuntimeError, match="phase 'update' inside phase 'rollout'"),
        progress.phase("update"),
    ):
        pass
    for name in ("rolout", "step", "other"):
        with pytest.raises(ValueError, match=f"unknown phase '{name}'"), progress.phase(name):
            pass
    with progress.phase("update"):  # the refusals left no phase open
        pass
    assert progress.take_times().keys() == {f"time/{name}" for name in ("rollout", "update", "other", "step")}


def test_plain_line_of_a_step() -> None:
    clock = Clock()
    progress, out = make(clock, done=1)
    with progress:
        progress.status("loading the teacher")
        clock.now += 1000.0  # loading is not part of the estimate
        progress.start_training()
        clock.now += 20.0
        progress.finish_step(RECORD)
        progress.finish_step({"step": 4, "loss": float("nan"), "evaluation/accuracy": 0.25})
    assert out.getvalue().splitlines() == [
        "loading the teacher",
        "step 3/8  loss 0.1235  H_s 1.500  H_t 0.750  zones A 50% B 40% C 10%  2.2 s  1,234 tokens/s  ETA 0:50",
        "step 4/8  loss nan  accuracy 25.0%  ETA 0:27",
    ]


def test_other_ranks_are_silent() -> None:
    progress, out = make(Clock(), terminal=True, enabled=False)
    with progress:
        progress.status("loading")
        progress.finish_step(RECORD)
    assert out.getvalue() == ""


def test_terminal_shows_phase_and_last_accuracy() -> None:
    clock = Clock()
    progress, out = make(clock, terminal=True)
    with progress:
        progress.finish_step(RECORD | {"evaluation/accuracy": 0.5})
        progress.finish_step(RECORD | {"step": 4})
        with progress.phase("teacher"):
            shown = Console(file=io.StringIO(), width=200)
            shown.print(progress._render())
    assert isinstance(shown.file, io.StringIO)
    text = " ".join(shown.file.getvalue().split())
    assert text == (
        "step 5: teacher step 4/8 loss 0.1235 H_s 1.500 H_t 0.750 zones A 50% B 40% C 10% 2.2 s 1,234 tokens/s "
        "accuracy 50.0% ETA 0:00"
    )
    assert "\x1b[?25l" in out.getvalue() and "\x1b[?25h" in out.getvalue()  # cursor hidden, and shown again


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 65, 3725)] == ["0:00", "1:00", "1:05", "1:02:05"]
