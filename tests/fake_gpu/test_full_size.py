"""Models at full size, one rank of 32 at a time: they build, score, update and give their weights.

They do so in the memory that the plan says, and wait for the device only where something needs it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.environment import ROOT, Environment
from tests.fake_gpu.launch import HERE, run_program

BOUNDS = tomllib.loads((HERE / "bounds.toml").read_text())
WORLD = 32
CONFIGS = ROOT / "tests" / "hf_configs"
PAIRS = {
    "nemotron_8b_49b": ("nemotron_nano_8b", "nemotron_super_49b"),
    "olmo3_7b_32b": ("olmo3_7b", "olmo3_32b"),
    "qwen3_1p7b_8b": ("qwen3_1p7b", "qwen3_8b"),
}
RANKS = (0, 15, 31)
Measure = Callable[[str, dict[str, Any]], None]

# Beside the examples as they are: every other precision, recomputed layers off or on, and the kernels' other backend.
VARIANTS: dict[str, tuple[str, int, list[str]]] = {
    "bfloat16": ("nemotron_8b_49b", 0, ["precision.student=bfloat16", "precision.teacher=bfloat16"]),
    "tensorwise": (
        "qwen3_1p7b_8b",
        0,
        ["precision.student=fp8_tensorwise", "precision.teacher=fp8_tensorwise"],
    ),
    "blockwise": ("olmo3_7b_32b", 0, ["precision.student=fp8_blockwise", "precision.teacher=fp8_blockwise"]),
    "mxfp8": ("qwen3_1p7b_8b", 0, ["precision.student=fp8_mxfp8", "precision.teacher=fp8_mxfp8"]),
    "modelopt_fp8": ("nemotron_8b_49b", 0, ["precision.teacher=modelopt_fp8"]),
    "recompute": ("qwen3_1p7b_8b", 0, ["student.recompute=full"]),
    "triton": ("qwen3_1p7b_8b", 0, ["kernel.backend=triton"]),
}
# Stages send and receive; the last one has the output layers.
PIPELINE = ["student.parallel.pipeline=2", "teacher.parallel.pipeline=4"]


def rehearse(
    environment: Environment, tmp_path: Path, example: str, rank: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """One rank's report; large copies are counted and not done, so that a model costs no memory."""
    student, teacher = PAIRS[example]
    paths = [f"student.path={CONFIGS / student}", f"teacher.path={CONFIGS / teacher}"]
    settings = {"FAKE_COPY_LIMIT_MIB": "16", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if "precision.student=fp8_mxfp8" in overrides:
        settings["FAKE_SM"] = "100"  # Blackwell's format
    if "precision.teacher=modelopt_fp8" in overrides:
        settings["PYTHONOPTIMIZE"] = "1"  # ModelOpt asserts on values that no kernel has computed
    report: dict[str, Any] = run_program(
        environment,
        "full_size",
        tmp_path,
        settings=settings,
        config=str(ROOT / "examples" / example / "config.yaml"),
        overrides=[*paths, *overrides],
        world=WORLD,
        rank=rank,
        rollouts=2,
        checkpoint=None,
    )
    return report


def check_report(report: dict[str, Any], steps: str) -> dict[str, float]:
    """Measured over planned memory by phase, after everything else has been checked. `steps`: whose bounds hold."""
    readings = report["readings"]
    assert report["microbatches"] > 1
    assert readings["update"]["applied"] and report["streamed"] > 1e9
    # Two passes of several layers each; fewer means that a model was not run.
    assert readings["teacher"]["launches"] > 100 and readings["update"]["launches"] > 1000
    for phase, bounds in BOUNDS[steps].items():
        counted = readings[phase]
        waits = sum(counted[name] for name in ("sync_stream", "sync_event", "sync_device", "sync_memcpy"))
        assert waits <= bounds["waits"], f"{phase}: {waits} waits"
        copies = counted["copies_d2h"]
        assert copies <= bounds["copies_to_host"], f"{phase}: {copies} copies to the host"
    return {
        phase: readings[phase]["allocated" if phase == "build" else "peak"]
        / sum(report["planned"][phase].values())
        for phase in BOUNDS["memory"]
    }


def check(name: str, report: dict[str, Any], measure: Measure, steps: str = "step") -> None:
    """All of a report; its memory is within the stated share of the plan, in both directions."""
    ratios = check_report(report, steps)
    measure(name, report | {"of the plan": ratios})
    for phase, tolerance in BOUNDS["memory"].items():
        assert abs(ratios[phase] - 1) <= tolerance, f"{phase}: {ratios[phase]:.3f} of the plan ({ratios})"


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("example", PAIRS)
def test_examples(newest: Environment, tmp_path: Path, measure: Measure, example: str, rank: int) -> None:
    """The first, a middle and the last rank of the examples' 32."""
    report = rehearse(newest, tmp_path, example, rank, [])
    check(f"{example}, rank {rank}", report, measure)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(newest: Environment, tmp_path: Path, measure: Measure, name: str) -> None:
    """Other precisions and switches of the same examples."""
    example, rank, overrides = VARIANTS[name]
    report = rehearse(newest, tmp_path, example, rank, overrides)
    check(f"{example}, {name}", report, measure)


@pytest.mark.parametrize("rank", RANKS)
def test_pipeline(newest: Environment, tmp_path: Path, measure: Measure, rank: int) -> None:
    """A first, a middle and a last stage of the teacher, and both of the student."""
    report = rehearse(newest, tmp_path, "qwen3_1p7b_8b", rank, PIPELINE)
    check(f"qwen3_1p7b_8b, pipeline, rank {rank}", report, measure, "pipeline_step")


@pytest.mark.parametrize("precision", ["bfloat16", "fp8_tensorwise"])
def test_checkpoint(newest: Environment, tmp_path: Path, precision: str) -> None:
    """The quick start's state with Transformer Engine's layers comes back to the bit, and training goes on."""
    report = run_program(
        newest,
        "full_size",
        tmp_path,
        config=str(ROOT / "examples" / "quickstart" / "config.yaml"),
        overrides=[
            "device=cuda",
            f"precision.student={precision}",
            "precision.teacher=bfloat16",
            "student.parallel.tensor=1",
            "teacher.parallel.tensor=1",
        ],
        world=1,
        rank=0,
        rollouts=2,
        checkpoint=str(tmp_path / "checkpoints"),
    )
    kept = report["checkpoint"]
    assert kept["tensors"] > 50 and kept["different"] == [] and kept["applied"], kept
