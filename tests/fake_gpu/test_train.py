"""The command line from its launcher to its last checkpoint on GPUs whose operators compute, against the CPU's run.

Responses are those of the data (`student_share: 0`): vLLM's own kernels compute nothing here. Layers are the local
ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.metrics import deterministic_keys
from sead_megatron.records import read_records
from sead_megatron.training.checkpoint_files import checkpoint_path
from tests.fake_gpu.environment import ROOT, Environment
from tests.fake_gpu.launch import COMPUTING, run_command
from tests.integration.test_objective_jobs import write_quickstart_job

STEPS = 2
# Relative, of losses, norms and entropies in float32. Seen: 2e-6.
TOLERANCE = 2e-5
CHANGES = {
    "steps": STEPS,
    "objective": {"name": "gkd", "student_share": 0},
    "student": {"parallel": {"tensor": 2, "sequence": True}},
    "teacher": {"parallel": {"tensor": 1, "pipeline": 2}},
    "precision": {"allow_local_layers": True},
    "data": {"prompts_per_step": 8},
    "kernel": {"backend": "torch"},
    "checkpoint": {"every": 1},
}


def train(environment: Environment, job: Path, run: Path, device: str) -> list[dict[str, Any]]:
    """`python -m sead_megatron train` on two ranks; the run's metrics."""
    arguments = ["-m", "sead_megatron", "train", str(job), "--nproc-per-node=2"]
    arguments += [f"run_dir={run}", f"device={device}"]
    on_gpu = device == "cuda"
    ended = run_command(environment, arguments, COMPUTING if on_gpu else {}, 420, on_gpu=on_gpu)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    return [
        {key: record[key] for key in deterministic_keys() if key in record}
        for record in read_records(run / "metrics.jsonl")
    ]


def test_a_run_is_the_cpus(pairs: dict[str, Environment], tmp_path: Path) -> None:
    """Every metric of every step, and the same ones again after the last checkpoint was lost."""
    environment, job = pairs["vllm-0.32"], write_quickstart_job(tmp_path, CHANGES)
    runs = {device: tmp_path / device for device in ("cpu", "cuda")}
    on_cpu, on_gpu = (train(environment, job, run, device) for device, run in runs.items())
    assert [record["step"] for record in on_gpu] == [1, 2]
    assert on_gpu[0]["loss"] != on_gpu[1]["loss"] and on_gpu[1]["skipped_steps"] == 0
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-6)
    shutil.rmtree(checkpoint_path(runs["cuda"] / "checkpoints", STEPS))
    assert train(environment, job, runs["cuda"], "cuda") == on_gpu


# What each section must have measured.
MEASURED = {
    "kernels": ("cuda bfloat16 pointwise jsd dW", "triton float32 dh", "torch float32 topk logits"),
    "step": ("train_step weights", "token_stats forward_kl"),
    "model": ("calls in train_step",),
    "speed": ("against",),
    "checkpoint": ("next step's weights",),
    "sanitizer": ("tiles that disagree",),
}


@pytest.mark.parametrize("section", MEASURED)
def test_the_gpu_check(pairs: dict[str, Environment], tmp_path: Path, section: str) -> None:
    """A section of `tools/gpu_check.py` at tiny sizes: its numbers are compared, as on a GPU."""
    output = tmp_path / "gpu_check.json"
    arguments = ["--tiny", "--sections", section, "--output", str(output)]
    ended = run_command(
        pairs["vllm-0.32"], [str(ROOT / "tools" / "gpu_check.py"), *arguments], COMPUTING, 580
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    (entry,) = json.loads(output.read_text())["sections"].values()
    assert entry["status"] == "passed" and set(MEASURED[section]) <= set(entry["numbers"])
