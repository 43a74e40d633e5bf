"""What a user meets before anything loads, on a machine with eight GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_gpu.environment import ROOT, Environment
from tests.fake_gpu.launch import run_command

EXAMPLE = ROOT / "examples" / "quickstart" / "config.yaml"
ON_CUDA = [
    "device=cuda",
    "precision.student=bfloat16",
    "precision.teacher=bfloat16",
    "evaluation.prompts=null",
    "evaluation.every=0",
]


def check(
    environment: Environment, tmp_path: Path, *overrides: str, settings: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code of `check` for eight processes, and all it said."""
    arguments = ["-m", "sead_megatron", "check", str(EXAMPLE), f"run_dir={tmp_path / 'run'}", *ON_CUDA]
    ended = run_command(
        environment, [*arguments, *overrides, "--world-size", "8"], {"FAKE_GPUS": "8"} | (settings or {}), 300
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_run_on_eight_gpus_passes(newest: Environment, tmp_path: Path) -> None:
    code, said = check(newest, tmp_path)
    assert code == 0, said[-4000:]
    assert "layers: Transformer Engine 2.20.2, which fuses gradient accumulation" in said


def test_what_does_not_fit_is_one_line(newest: Environment, tmp_path: Path) -> None:
    """A model that is too large for the GPUs' memory."""
    code, said = check(newest, tmp_path, settings={"FAKE_GPU_MIB": "2048"})
    assert code == 2 and said.count("error:") == 1, said[-4000:]
    assert "GiB" in said


def test_without_transformer_engine(pairs: dict[str, Environment], tmp_path: Path) -> None:
    """Refused, unless the configuration asks for local layers."""
    code, said = check(pairs["vllm-0.32"], tmp_path)
    assert code == 2 and "allow_local_layers" in said, said[-4000:]
    code, said = check(pairs["vllm-0.32"], tmp_path, "precision.allow_local_layers=true")
    assert code == 0 and "local" in said, said[-4000:]


@pytest.mark.parametrize("gpus", ["0", "4"])
def test_processes_without_a_gpu(newest: Environment, tmp_path: Path, gpus: str) -> None:
    """`train` counts the visible GPUs before it starts torchrun."""
    arguments = ["-m", "sead_megatron", "train", str(EXAMPLE), f"run_dir={tmp_path / 'run'}", *ON_CUDA]
    ended = run_command(newest, [*arguments, "--nproc-per-node", "8"], {"FAKE_GPUS": gpus}, 300)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2 and said.count("error:") == 1, said[-4000:]
    assert ("no GPU is visible" if gpus == "0" else "must be at most the visible GPUs (4)") in said
