"""nvcc compiles the kernels for the real chips, within their budgets; the library loads without a driver."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from sead_kernels.split_kl.cuda import CudaTiles
from sead_kernels.split_kl.cuda.build import build, find_nvcc, load
from sead_kernels.split_kl.cuda.resources import Resources, kernel_resources

if find_nvcc() is None:
    pytest.skip("nvcc not found: the CUDA kernels are not compiled for a GPU here", allow_module_level=True)

BUDGETS = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text())


@pytest.fixture(scope="module", params=BUDGETS["architectures"])
def resources(request: pytest.FixtureRequest) -> dict[str, Resources]:
    return kernel_resources(request.param)


def exceeded(used: Resources, budget: dict[str, int]) -> list[str]:
    return [
        f"{key}: {getattr(used, key)} > {limit}"
        for key, limit in budget.items()
        if getattr(used, key) > limit
    ]


def test_every_kernel_keeps_its_budget(resources: dict[str, Resources]) -> None:
    assert set(resources) == set(BUDGETS["kernels"]), "budgets.toml must list every kernel"
    over = {name: exceeded(resources[name], budget) for name, budget in BUDGETS["kernels"].items()}
    assert not any(over.values()), over


def test_a_smaller_budget_would_be_exceeded(resources: dict[str, Resources]) -> None:
    """The numbers are read from the report: one register or byte less than was used is too little."""
    used = resources["topk_kernel"]
    assert used.registers > 8 and used.shared >= 8192
    assert exceeded(used, {"registers": used.registers - 1, "spills": 0, "shared": used.shared - 1}) == [
        f"registers: {used.registers} > {used.registers - 1}",
        f"shared: {used.shared} > {used.shared - 1}",
    ]


def test_the_library_of_every_architecture_builds_and_loads() -> None:
    for architecture in BUDGETS["architectures"]:
        assert build(architecture).stat().st_size > 0
        load(architecture)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a driver")
def test_a_launch_without_a_driver_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CudaTiles()
    monkeypatch.setattr(kernels, "_architecture_of", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))
    z = torch.zeros(1, 17)[:, :16]
    with pytest.raises(RuntimeError, match=r"split_kl_entropy: CUDA error \d+: .*driver"):
        kernels.entropy(z, [], torch.zeros(1, dtype=torch.int64), 1.0, torch.zeros(4, 1))
