"""What the compiler makes of every kernel as shipped, within ``budgets.toml``; no GPU needed.

A kernel that spills or loses its tensor-core instructions still computes the right numbers, several times slower.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sead_kernels.split_kl import PointwiseRule
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

_TABLES = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text())
BUDGETS = {(kernel, arch): limits for kernel, archs in _TABLES.items() for arch, limits in archs.items()}

# Its clip is infinite: a launch must compile the same code as with a finite one.
RULE = PointwiseRule("jsd", 0.5)

# Of one program on an H100 or B200.
ALL_SHARED_MEMORY = 232448


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, int]]:
    """Resources by (kernel, arch), from a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "sead_kernels.split_kl.triton.aot", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    return {(row["kernel"], row["arch"]): row for row in json.loads(child.stdout)}


def test_every_kernel_has_a_budget(compiled: dict[tuple[str, str], dict[str, int]]) -> None:
    assert set(BUDGETS) == set(compiled)


@pytest.mark.parametrize(("kernel", "arch"), BUDGETS)
def test_budget(kernel: str, arch: str, compiled: dict[tuple[str, str], dict[str, int]]) -> None:
    found, limits = compiled[kernel, arch], BUDGETS[kernel, arch]
    assert {"max_registers", "max_spill_loads", "max_spill_stores", "max_shared"} <= set(limits)
    assert limits["max_shared"] <= ALL_SHARED_MEMORY
    for name, limit in limits.items():
        bound, field = name.split("_", 1)
        assert bound in ("min", "max")
        within = found[field] >= limit if bound == "min" else found[field] <= limit
        assert within, f"{kernel} on {arch}: {field} is {found[field]}, budget {name} = {limit}"


def _launches() -> dict[str, Callable[[torch.dtype], object]]:
    """Calls of ``launch`` on shapes that divide no tile, by the name that ``aot`` gives to the kernel."""
    from sead_kernels.split_kl.triton import launch
    from sead_kernels.split_kl.triton.tile_sizes import FLOAT32_TILES, TENSOR_CORE_TILES, Tile

    def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = ((130, 72), (260, 72), (130, 136), (260, 136))
        student, weight, teacher, teacher_weight = (torch.zeros(size, dtype=dtype) for size in sizes)
        return student, weight, teacher, teacher_weight

    def tile(kernel: str, dtype: torch.dtype) -> Tile:
        return FLOAT32_TILES[kernel] if dtype == torch.float32 else TENSOR_CORE_TILES[kernel, "sm_90"]

    def dz(dtype: torch.dtype) -> object:
        columns, scalars = torch.zeros(130, dtype=torch.int32), torch.zeros(7, 130)
        tile_of_dz = torch.zeros(130, 272, dtype=dtype)[:, :260]
        return launch.dz(*matrices(dtype), columns, scalars, tile_of_dz, 0.7, tile("dz", dtype))

    def support_dz(dtype: torch.dtype) -> object:
        ids, values, scalars = (
            torch.zeros(130, 3, dtype=torch.int64),
            torch.zeros(130, 3),
            torch.zeros(3, 130),
        )
        tile_of_dz = torch.zeros(130, 272, dtype=dtype)[:, :260]
        operands = matrices(dtype)[:2]
        return launch.support_dz(
            *operands, scalars, ids, values, 0, tile_of_dz, 0.7, tile("support_dz", dtype)
        )

    def pointwise_stats(dtype: torch.dtype) -> object:
        lse, operands = torch.zeros(2, 130), matrices(dtype)
        return launch.pointwise_stats(*operands, lse, RULE.numbers(), 0.7, tile("pointwise_stats", dtype))

    def pointwise_dz(dtype: torch.dtype) -> object:
        tile_of_dz = torch.zeros(130, 272, dtype=dtype)[:, :260]
        rest = torch.zeros(4, 130), RULE.numbers(), tile_of_dz, 0.7
        return launch.pointwise_dz(*matrices(dtype), *rest, tile("pointwise_dz", dtype))

    def gather(dtype: torch.dtype) -> object:
        return launch.gather(*matrices(dtype)[:2], torch.zeros(130, 3, dtype=torch.int64), 0, 0.7)

    return {
        "stats": lambda dtype: launch.stats(*matrices(dtype), 0.7, tile("stats", dtype)),
        "entropy": lambda dtype: launch.entropy(*matrices(dtype)[:2], 0.7, tile("entropy", dtype)),
        "topk_128": lambda dtype: launch.topk(*matrices(dtype)[:2], 0, 100, 0.7, tile("topk", dtype)),
        "dz": dz,
        "support_dz": support_dz,
        "pointwise_stats": pointwise_stats,
        "pointwise_dz": pointwise_dz,
        "gather": gather,
        "scatter": support_dz,
    }


class _Recorder:
    """Stands in for a kernel: keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "kernel",
    [
        *("stats", "entropy", "topk_128", "dz", "support_dz", "pointwise_stats", "pointwise_dz"),
        *("gather", "scatter"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_launch_compiles_what_the_budgets_are_about(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types, constants, options and specialisation of a launch are those compiled ahead of time."""
    from sead_kernels.split_kl.triton import aot, launch
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    name = kernel + ("_fp32" if dtype == torch.float32 else "")
    (case,) = (case for case in aot.cases() if (case.kernel, case.arch) == (name, "sm_90"))
    recorders = {name: _Recorder() for name in dir(launch) if name.endswith("_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)
    _launches()[kernel](dtype)
    ((args, kwargs),) = recorders[case.function.__name__].launches
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(case.function.signature, case.function.params, backend)
    options, signature, constants, attributes = case.function._pack_args(
        backend, kwargs, *binder(*args, **kwargs)
    )
    source = case.source()
    assert signature == source.signature
    assert constants == source.constants
    assert {key: value for key, value in attributes.items() if value} == source.attrs
    assert options == backend.parse_options(dict(case.options))
