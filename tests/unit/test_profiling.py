"""Which ranges are made and when, the trace on disk, the calls on CUDA, and the summary of a trace."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sead_megatron import profiling
from sead_megatron.config import load_config
from sead_megatron.config.schema import ProfileConfig
from sead_megatron.errors import UserError
from sead_megatron.profiling import MegatronTimers, NvtxCapture, Profile, TraceCapture, build_profile
from tests.tiny_inputs import write_inputs


class Recorded:
    """A capture that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.depth = 0

    def start(self) -> None:
        self.calls.append("start")

    def stop(self, first: int, end: int) -> None:
        self.calls.append(f"stop {first} {end}")

    def push(self, name: str) -> None:
        self.calls.append("  " * self.depth + name)
        self.depth += 1

    def pop(self) -> None:
        self.depth -= 1


def run_schedule(timers: MegatronTimers | None, microbatches: int) -> None:
    """Calls a model's timers as Megatron's schedule does on a middle stage."""
    if timers is None:
        return
    timers("forward-backward", log_level=1).start(barrier=True)
    for _ in range(microbatches):
        for name in ("forward-recv", "forward-compute", "backward-compute"):
            timers(name, log_level=2).start()
            timers(name).stop()
    timers("all-grads-sync", log_level=1).start(barrier=True)
    timers("all-grads-sync").stop()
    timers("forward-backward").stop()


def run_steps(profile: Profile, steps: range, teacher: Any, student: Any) -> None:
    for step in steps:
        with profile.step(step):
            with profile.phase("teacher", nullcontext()):
                run_schedule(teacher.timers, 1)
            with profile.phase("update", nullcontext()):
                run_schedule(student.timers, 2)


SCHEDULE = [
    "update/schedule",
    *(f"  update/{name}/{i}" for i in (0, 1) for name in ("forward-recv", "forward", "backward")),
    "  update/all-grads-sync",
]


def expected_step(step: int) -> list[str]:
    """The ranges of a step of `run_steps`."""
    teacher = ["schedule", "  forward-recv/0", "  forward/0", "  backward/0", "  all-grads-sync"]
    return [
        f"step/{step}",
        "  teacher",
        *("    " + line.replace(line.strip(), f"teacher/{line.strip()}") for line in teacher),
        "  update",
        *("    " + line for line in SCHEDULE),
    ]


def make(start: int, stop: int) -> tuple[Profile, Recorded, SimpleNamespace, SimpleNamespace]:
    capture = Recorded()
    profile = Profile(ProfileConfig(start_step=start, stop_step=stop), capture)
    teacher, student = SimpleNamespace(timers=None), SimpleNamespace(timers=None)
    profile.watch(student, teacher)
    return profile, capture, teacher, student


# --- which ranges, when


def test_ranges_of_exactly_the_asked_steps() -> None:
    """The microbatches of every pass are counted from 0, and the models are as before when the capture ends."""
    profile, capture, teacher, student = make(3, 5)
    run_steps(profile, range(1, 7), teacher, student)
    assert capture.calls == ["start", *expected_step(3), *expected_step(4), "stop 3 5"]
    assert capture.depth == 0
    assert (teacher.timers, student.timers) == (None, None)


def test_a_run_that_continues_inside_the_range() -> None:
    profile, capture, teacher, student = make(2, 5)
    run_steps(profile, range(4, 7), teacher, student)
    assert capture.calls == ["start", *expected_step(4), "stop 4 5"]


@pytest.mark.parametrize(("done", "warned"), [(0, False), (3, False), (4, True), (9, True)])
def test_steps_that_were_done_before(done: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Steps 2 to 4: after 3 finished steps one of them is left."""
    profile, *_ = make(2, 5)
    with caplog.at_level(logging.WARNING):
        profile.resume(done)
    assert ("steps 2 to 4 were done before" in caplog.text) == warned


def test_a_range_ends_with_the_time_of_its_phase() -> None:
    """The time ends when the device is done: kernels would else run on behind their range."""
    profile, capture, *_ = make(1, 2)

    @contextmanager
    def timed() -> Iterator[None]:
        yield
        capture.calls.append(f"{'  ' * capture.depth}device done")

    for step in (1, 2):
        with profile.step(step), profile.phase("update", timed()):
            pass
    assert capture.calls == ["start", "step/1", "  update", "    device done", "stop 1 2", "device done"]


def test_a_failing_step_closes_its_ranges() -> None:
    profile, capture, *_ = make(1, 2)
    with (
        pytest.raises(KeyError),
        profile.step(1),
        profile.phase("rollout", nullcontext()),
    ):
        raise KeyError
    assert (capture.calls, capture.depth) == (["start", "step/1", "  rollout"], 0)


def test_off_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Profile, and a phase of the trainer is what the clock gave, not wrapped in anything."""
    from sead_megatron.train import Trainer

    config = load_config(write_inputs(tmp_path), ["device=cpu", "rollout.kv_cache_gib=0.1"])
    asked = load_config(write_inputs(tmp_path), ["profile={start_step: 1, stop_step: 2, ranks: [1]}"])
    assert build_profile(config, 0) is None
    assert build_profile(asked, 0) is None
    assert not (tmp_path / "run").exists()
    timed = nullcontext()
    job: Any = SimpleNamespace(config=config, rank=0, profile=None)
    progress: Any = SimpleNamespace(phase=lambda name: timed)
    nothing: Any = None
    assert Trainer(job, nothing, progress, nothing).phase("rollout") is timed


def test_the_device_chooses_the_capture(tmp_path: Path) -> None:
    path = write_inputs(tmp_path)
    on = "profile={start_step: 1, stop_step: 2, ranks: [1]}"
    on_cuda = build_profile(load_config(path, [on]), 1)
    on_cpu = build_profile(load_config(path, [on, "device=cpu"]), 1)
    assert on_cuda is not None and isinstance(on_cuda._capture, NvtxCapture)
    assert on_cpu is not None and isinstance(on_cpu._capture, TraceCapture)
    assert (tmp_path / "run/profile").is_dir()


# --- CUDA


def test_calls_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler is switched when the GPU is idle, so that the capture holds these steps' kernels and no others."""
    calls: list[str] = []
    for module, names in (
        (torch.cuda, ["synchronize"]),
        (torch.cuda.profiler, ["start", "stop"]),
        (torch.cuda.nvtx, ["range_push", "range_pop"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args, name=name: calls.append(" ".join([name, *args])))
    profile = Profile(ProfileConfig(start_step=2, stop_step=3), NvtxCapture())
    for step in (1, 2, 3):
        with profile.step(step), profile.phase("rollout", nullcontext()):
            pass
    ranges = ["range_push step/2", "range_push rollout", "range_pop", "range_pop"]
    assert calls == ["synchronize", "start", *ranges, "synchronize", "stop"]


# --- the trace on the CPU


def run_traced(directory: Path) -> Path:
    capture = TraceCapture(directory, rank=3)
    profile = Profile(ProfileConfig(start_step=2, stop_step=4), capture)
    for step in range(1, 5):
        with profile.step(step), profile.phase("rollout", nullcontext()):
            torch.ones(8, 8) @ torch.ones(8, 8)
    return directory / "rank_3_steps_2_4.json.gz"


def test_trace_of_two_steps(tmp_path: Path) -> None:
    path = run_traced(tmp_path / "run/profile")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert ranges == ["step/2", "rollout", "step/3", "rollout"]
    assert sum(event["name"] == "aten::mm" for event in events) == 2


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Said before a step is run."""
    (tmp_path / "run").touch()
    with pytest.raises(UserError) as error:
        TraceCapture(tmp_path / "run/profile", 0)
    assert str(error.value) == (
        f'profile = "{tmp_path}/run/profile": the trace cannot be written (Not a directory); make room or set its '
        "permissions, or set profile.start_step and profile.stop_step to 0"
    )


def test_directory_that_takes_no_file() -> None:
    """Whoever runs the test, it cannot make a file there."""
    with pytest.raises(UserError, match='profile = "/proc/self": the trace cannot be written'):
        TraceCapture(Path("/proc/self"), 0)


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_trace_that_torch_did_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """On a full disk torch's writer returns as if nothing was wrong; no part of a trace is left."""
    export = profiling.profile.export_chrome_trace

    def cut(self: Any, path: str) -> None:
        export(self, path)
        content = Path(path).read_bytes()
        # Behind a brace, where it is hardest to tell.
        Path(path).write_bytes(content[: content.rfind(b"}", 0, int(kept * len(content))) + 1])

    monkeypatch.setattr(profiling.profile, "export_chrome_trace", cut)
    with pytest.raises(UserError, match=r"rank_3_steps_2_4\.json\.gz.*ends in the middle; is the disk full"):
        run_traced(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trace_that_cannot_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure keeps the trace of an earlier run of these steps."""
    earlier = tmp_path / "rank_3_steps_2_4.json.gz"
    earlier.write_bytes(b"earlier")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run_traced(tmp_path)
    assert list(tmp_path.iterdir()) == [earlier]
    assert earlier.read_bytes() == b"earlier"


# --- tools/summarise_trace.py


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools/summarise_trace.py"
    spec = importlib.util.spec_from_file_location("summarise_trace", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_trace(path: Path, *ranges: tuple[str, float, float]) -> Path:
    """Ranges of (name, start, duration) in milliseconds, an operator, and a range that torch makes itself."""
    events: list[dict[str, Any]] = [
        {"cat": "user_annotation", "name": name, "ts": 1000 * start, "dur": 1000 * duration}
        for name, start, duration in ranges
    ]
    events.append({"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1e6})
    events.append({"cat": "user_annotation", "name": "gloo:all_reduce", "ts": 0, "dur": 1e6})
    path.write_text(json.dumps({"traceEvents": events[::-1]}))  # in no order
    return path


def test_summary(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A range ends where the next begins, and a phase begins with its step."""
    trace = write_trace(
        tmp_path / "trace.json",
        *(
            ("step/3", 0, 100),
            ("teacher", 0, 30),
            ("teacher/forward/0", 5, 10),
            ("teacher/forward/1", 15, 15),
        ),
        *(("update", 30, 50), ("step/4", 100, 100), ("update", 120, 60), ("update/forward/0", 120, 59)),
    )
    assert tool.main([str(trace)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| step | 2 | 200.0 | 100.0% | 60.0 | 100.00 | 100.00 |",
        "| teacher | 1 | 30.0 | 15.0% | 5.0 | 30.00 | 30.00 |",
        "| teacher/forward | 2 | 25.0 | 12.5% | 25.0 | 12.50 | 15.00 |",
        "| update | 2 | 110.0 | 55.0% | 51.0 | 55.00 | 60.00 |",
        "| update/forward | 1 | 59.0 | 29.5% | 59.0 | 59.00 | 59.00 |",
    ]
    assert tool.main([str(trace), "--each", "teacher/forward"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| teacher/forward/0 | 5.00 | 10.00 | 10.00 |",
        "| teacher/forward/1 | 15.00 | 15.00 | 15.00 |",
    ]


def test_summary_of_a_written_trace(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(run_traced(tmp_path))]) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["| step", "2"], ["| rollout", "2"]]


def test_files_that_are_no_trace(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.json", ("step/1", 0, 1))
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(trace.read_bytes())[:-20])
    broken, empty = tmp_path / "broken.json", write_trace(tmp_path / "empty.json")
    broken.write_text("{")
    for arguments, message in (
        ([str(tmp_path / "none.json")], f"{tmp_path}/none.json: cannot be read (No such file or directory)"),
        ([str(cut)], f"{cut}: cannot be read (Compressed file ended"),
        ([str(broken)], f"{broken}: is no trace; give"),
        ([str(empty)], f"{empty}: holds no range of a step; give"),
        ([str(trace), "--each", "stats"], '--each = "stats": not a range of this trace; use one of step'),
    ):
        assert tool.main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
