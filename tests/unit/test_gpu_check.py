"""tools/gpu_check.py without a GPU: time is shared out and kept, deviations are found, the program runs on the CPU.

The sections themselves run on the CPU at tiny sizes, all of them in the slow test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sead_kernels.split_kl.cuda.emulated_check import CANARY, ROWS, guarded

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from gpu_checks import checkpoint, device_tiles, kernels, model, pair, sanitizer, step  # noqa: E402
from gpu_checks.report import Context, Report  # noqa: E402
from gpu_checks.sections import NAMES, SECTIONS, seconds_for  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "section.json")


# --- time


def test_time_is_shared_out_whatever_the_sections_take() -> None:
    """If each takes all it may, the sum is what there was; what one leaves, the others get."""
    left = 540.0
    for number, section in enumerate(SECTIONS):
        limit = seconds_for(section, SECTIONS[number + 1 :], left)
        assert 0 < limit <= left
        left -= limit
    assert left == pytest.approx(0)
    assert seconds_for(SECTIONS[1], SECTIONS[2:], 500) > seconds_for(SECTIONS[1], SECTIONS[2:], 400)


WORKER = """
import json, subprocess, sys, time
from pathlib import Path
name, directory = sys.argv[1:3]
if name == "kernels":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = {"numbers": {"pid": child.pid}, "failures": []}
    Path(directory, name + ".json").write_text(json.dumps(found))
    time.sleep(60)
if name == "step":
    raise ValueError("as if it were one of ours")
sys.exit(3 if name == "sanitizer" else 0)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    """It is killed with what it started, keeps the numbers it had, and the next ones run."""
    (tmp_path / "gpu_checks").mkdir()
    (tmp_path / "gpu_checks" / "__init__.py").touch()
    (tmp_path / "gpu_checks" / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    results, started = {}, time.monotonic()
    for name in ("kernels", "step", "model", "sanitizer"):
        section = SECTIONS[NAMES.index(name)]
        limit = 5.0 if name == "kernels" else 60.0
        results[name] = gpu_check.run_section(section, limit, tmp_path, "cpu", False, environment)
    assert time.monotonic() - started < 60
    statuses = [entry["status"] for entry in results.values()]
    assert statuses == ["timed out", "failed", "passed", "skipped"]
    assert not is_running(results["kernels"]["numbers"]["pid"])
    assert "after 5 s" in results["kernels"]["failures"][0]
    assert "ValueError: as if it were one of ours" in results["step"]["failures"][0]
    assert results["model"]["failures"] == []


def test_last_words_of_a_crash_are_its_innermost_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "a\nFatal Python error\nCurrent thread 0x1 (most recent call first):\n  File x\n  File y\nz\n"
    )
    assert gpu_check.last_words(log) == "File x | File y | z"
    log.write_text("a\nb\nc\nd\n")
    assert gpu_check.last_words(log) == "b | c | d"


# --- what counts as a failure


@pytest.mark.parametrize(
    ("error", "verdict", "fails"),
    [(0.9e-5, "within", False), (1.1e-5, "beyond", True), (float("nan"), "beyond", True)],
)
def test_a_deviation(tmp_path: Path, error: float, verdict: str, fails: bool) -> None:
    report = Report(tmp_path / "section.json")
    report.compare("logits", error, 1e-5)
    assert report.numbers["logits"]["verdict"] == verdict
    written = json.loads(report.path.read_text())
    assert written == {"numbers": report.numbers, "failures": report.failures}
    assert bool(report.failures) == fails


def test_a_part_that_raises_does_not_end_the_section(report: Report) -> None:
    with report.part("first"):
        raise ValueError("wrong\n  shape")
    with report.part("second"):
        report.number("seconds", 1)
    assert report.failures == ["first: ValueError: wrong shape"] and report.numbers == {"seconds": 1}


def test_a_kernel_that_is_off_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report
) -> None:
    """Both backends in both dtypes agree with the oracle; a divergence that is 1e-4 off does not."""
    monkeypatch.setattr(kernels, "CHECKS", (kernels.statistics,))
    kernels.run(Context(CPU, tmp_path, report))
    assert report.failures == [] and "torch bfloat16 reverse_kl" in report.numbers
    finalize = kernels.finalize

    def off(state: torch.Tensor) -> Any:
        stats = finalize(state)
        return stats._replace(forward_kl=stats.forward_kl + 1e-4)

    monkeypatch.setattr(kernels, "finalize", off)
    kernels.run(Context(CPU, tmp_path, report))
    assert report.failures and all("forward_kl" in failure for failure in report.failures)


def one_step() -> dict[str, Any]:
    ones = torch.ones(4, 3)
    measured = {"hidden": ones, "loss": 2.0, "grad_norm": 3.0, "applied": True}
    measured |= {name: {"a": ones[:, 0], "b": ones[:, 1]} for name in ("statistics", "columns")}
    return measured | {name: {"first": ones, "second": 2 * ones} for name in ("gradients", "weights")}


def test_equal_steps_agree(report: Report) -> None:
    step.compare(report, one_step(), one_step())
    assert report.failures == []


@pytest.mark.parametrize(
    "what", ["hidden", "statistics", "columns", "gradients", "weights", "loss", "grad_norm"]
)
def test_a_step_that_is_off_anywhere_is_found(report: Report, what: str) -> None:
    """By twice the tolerance of that number, in one tensor of several."""
    ours, tolerance = one_step(), {"hidden": step.HIDDEN, "loss": step.LOSS}.get(what, step.STATISTICS)
    if isinstance(ours[what], dict):
        name = list(ours[what])[-1]
        ours[what] = ours[what] | {name: ours[what][name] * (1 + 2 * tolerance)}
    else:
        ours[what] = ours[what] * (1 + 2 * tolerance)
    step.compare(report, ours, one_step())
    assert len(report.failures) == 1, report.failures


def test_a_step_that_was_skipped_is_a_failure(report: Report) -> None:
    step.compare(report, one_step() | {"applied": False}, one_step())
    assert report.failures == ["update applied: False on the device, True on the CPU"]


@pytest.mark.parametrize(("ratio", "fails"), [(1.1, False), (1.2, True), (0.8, True)])
def test_memory_far_from_the_plan_is_a_failure(
    tmp_path: Path, report: Report, ratio: float, fails: bool
) -> None:
    student, teacher = pair.write_pair(tmp_path, pair.TINY, torch.float32, CPU)
    config = pair.config_of(student, teacher, model.TINY_LOAD, CPU, torch.float32)
    planned = model.planned_gib(config, fused=False)
    student_weights = sum(parameter.numel() for parameter in _tensors(student).values())
    # Weights, gradients and two moments in float32, and something for the activations.
    assert 1.0 < planned["update"] * 2**30 / (16 * student_weights) < 5
    peaks = {"score": planned["teacher"], "train_step": ratio * planned["update"]}
    model._compare_with_plan(report, config, peaks, CPU)
    assert bool(report.failures) == fails


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_same_bits() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert checkpoint.same_bits(nan, nan.clone()) and checkpoint.same_bits(zero, zero.clone())
    assert not checkpoint.same_bits(zero, -zero) and not checkpoint.same_bits(zero, None)
    assert not checkpoint.same_bits(zero, zero.bfloat16())


# --- CUDA tiles


def test_a_write_beside_a_tile_comes_back() -> None:
    """The whole storage travels: a canary that the kernel overwrites on the device is overwritten here."""

    class Faulty:
        def stats(self, state: torch.Tensor, scale: float) -> None:
            assert state.shape == (10, ROWS) and state.stride() == (ROWS + 4, 1)
            state.add_(scale)
            state.as_strided((10, 1), (ROWS + 4, 1), 0).zero_()

    kernels_on_device = device_tiles.DeviceTiles(CPU)
    kernels_on_device._tiles = Faulty()
    state = guarded(10)
    kernels_on_device.stats(state[:, 2:-2], 1.0)
    assert (state[:, 2:-2] == CANARY + 1).all() and (state[:, 0] == 0).all()
    assert (state[:, [1, -2, -1]] == CANARY).all()


SUMMARIES = {
    "========= ERROR SUMMARY: 0 errors": True,
    "========= ERROR SUMMARY: 3 errors": False,
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": True,
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)": False,
}


@pytest.mark.parametrize(("line", "clean"), SUMMARIES.items())
def test_the_sanitizers_last_word(line: str, clean: bool) -> None:
    summary = sanitizer.summary_of(f"========= COMPUTE-SANITIZER\nall kernels agree\n{line}\n")
    assert summary is not None and sanitizer.is_clean(summary) == clean
    assert sanitizer.summary_of("========= Error: Device not supported\n") is None


@pytest.mark.parametrize(("code", "summary", "fails"), [(0, 0, False), (86, 2, True), (0, None, True)])
def test_what_a_sanitizer_finds_is_a_failure(
    tmp_path: Path, report: Report, code: int, summary: int | None, fails: bool
) -> None:
    program = tmp_path / "compute-sanitizer"
    text = "" if summary is None else f"========= ERROR SUMMARY: {summary} errors"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    program.chmod(0o755)
    sanitizer._watch(Context(CPU, tmp_path, report), str(program), "memcheck")
    assert bool(report.failures) == fails


# --- the program


def run_program(output: Path, *arguments: str, timeout: int) -> tuple[int, str, dict[str, Any]]:
    command = [
        sys.executable,
        str(TOOLS / "gpu_check.py"),
        "--device",
        "cpu",
        "--output",
        str(output),
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=environment,
        cwd=output.parent,
    )
    assert output.is_file(), done.stderr
    return done.returncode, done.stdout, json.loads(output.read_text())


def test_one_section_on_the_cpu(tmp_path: Path) -> None:
    code, shown, result = run_program(tmp_path / "out.json", "--sections", "speed", timeout=300)
    entry = result["sections"].pop("speed")
    assert (code, entry["status"], entry["failures"], result["sections"]) == (0, "passed", [], {})
    assert "passed    speed" in shown and len(shown.splitlines()) == 1
    assert result["versions"]["torch"] and result["machine"]["gpu"] is None
    losses = [row["loss"] for row in entry["numbers"]["against"].values() if "error" not in row]
    assert len(losses) >= 3 and losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


@pytest.mark.slow
def test_every_section_on_the_cpu(tmp_path: Path) -> None:
    """Both sides of a step are the CPU's, so they agree to the last bit; a checkpoint's next step too."""
    code, _, result = run_program(tmp_path / "out.json", timeout=600)
    sections = result["sections"]
    assert code == 0 and list(sections) == list(NAMES), sections
    numbers = {name: entry["numbers"] for name, entry in sections.items()}
    assert numbers["step"]["train_step gradients"]["error"] == 0.0
    assert numbers["checkpoint"]["next step's weights"]["error"] == 0.0
    assert numbers["checkpoint"]["tensors"] >= 60 and numbers["sanitizer"]["tiles that disagree"] == []
    assert numbers["model"]["calls in train_step"]["operators"] > 1000


def test_minutes_that_leave_no_time_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--minutes", "0.1"])
    assert "is not a number above" in capsys.readouterr().err
