"""The backends that the tests of this package run on; the Triton one has its own tests (an interpreter)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sead_kernels.split_kl import BACKENDS, TileOptions
from sead_kernels.split_kl.testing import EMULATED, register_emulated, small_tiles

CPU = torch.device("cpu")


@pytest.fixture(scope="package", autouse=True)
def emulated_cuda() -> Iterator[None]:
    """The CUDA source, compiled for the host, as one more backend."""
    register_emulated()
    yield
    del BACKENDS[EMULATED]


@pytest.fixture(params=["torch", "cpu", "cuda-emulated"])
def tiles(request: pytest.FixtureRequest) -> TileOptions:
    """Small tiles of every backend for float32 and bf16 inputs."""
    reason = BACKENDS[request.param].unavailable(CPU, torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return small_tiles(request.param)


# Which backend computes from which inputs: the CUDA kernels know float32 tiles only.
COMBINATIONS = [
    *[("torch", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)],
    *[("cpu", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)],
    *[("cuda-emulated", dtype) for dtype in (torch.float32, torch.bfloat16)],
]


@pytest.fixture(params=COMBINATIONS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}")
def tiles_and_dtype(request: pytest.FixtureRequest) -> tuple[TileOptions, torch.dtype]:
    """Every pair of backend and input dtype."""
    backend, dtype = request.param
    reason = BACKENDS[backend].unavailable(CPU, torch.float64 if dtype == torch.float64 else torch.float32)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return small_tiles(backend), dtype


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices: threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
