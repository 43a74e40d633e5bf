"""What only the C++ kernels have: threads of their own and an exponential of their own."""

from __future__ import annotations

import pytest
import torch
from sead_kernels.split_kl import PointwiseRule
from sead_kernels.split_kl.cpu import CpuTiles
from sead_kernels.split_kl.state import empty_state
from torch import Tensor

REASON = CpuTiles().unavailable(torch.device("cpu"), torch.float32)
if REASON is not None:
    pytest.skip(f"backend cpu: {REASON}", allow_module_level=True)


def padded(rows: int, width: int, seed: int) -> Tensor:
    """[rows, width] with spare columns of NaN between the rows."""
    whole = torch.full((rows, width + 16 - width % 16), float("nan"))
    whole[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4
    return whole[:, :width]


def outputs(threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    kernels, rows, width = CpuTiles(), 13, 1003
    z, w = padded(rows, width, 1), padded(rows, width, 2)
    columns = torch.arange(rows) * 90 - 50
    state = empty_state(rows, dtype=torch.float32, device=torch.device("cpu"))
    kernels.stats(z, w, [], columns, 0.8, state)
    logits, ids = torch.full((rows, 9), -1e30), torch.zeros(rows, 9, dtype=torch.int64)
    kernels.topk(z, [], 500, 0.8, logits, ids)
    scalars = torch.randn(7, rows, generator=torch.Generator().manual_seed(3)) + 9
    dz = torch.empty_like(z)
    kernels.gradient(z, w, [], columns, 0.8, scalars, dz)
    support = torch.empty_like(z)
    ids_of_support = torch.arange(26).reshape(rows, 2) * 50
    kernels.support_gradient(z, [], 0.8, scalars[:3], ids_of_support, torch.ones(rows, 2), support)
    rule = PointwiseRule("jsd", 0.3, clip=0.01).numbers()
    sums, pointwise = torch.zeros(4, rows), torch.empty_like(z)
    kernels.pointwise_stats(z, w, [], 0.8, scalars[:2], rule, sums)
    kernels.pointwise_gradient(z, w, [], 0.8, scalars[:4], rule, pointwise)
    return [state, logits, ids, dz, support, sums, pointwise]


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_results_do_not_depend_on_the_threads(threads: int) -> None:
    """13 rows: uneven shares, and more threads than rows."""
    for one, several in zip(outputs(1), outputs(threads), strict=True):
        assert torch.equal(one, several)


def test_the_exponential() -> None:
    """p (0 + 1 ln p) at b = 0, a = 1 is e^z itself: relative error 2e-7 from 0 to e^-87, NaN stays NaN."""
    z = torch.cat([torch.linspace(-87, 3, 5000), torch.tensor([0.0, -200.0, -1e30, float("nan")])])[None]
    whole = torch.zeros(1, 5008)
    whole[:, :5004] = z
    dz = torch.empty(1, 5008)[:, :5004]
    scalars = torch.tensor([[0.0], [1.0], [0.0]])
    nowhere = torch.full((1, 1), -1)
    CpuTiles().support_gradient(whole[:, :5004], [], 1.0, scalars, nowhere, torch.zeros(1, 1), dz)
    exact = z[0, :5001].double().exp()
    assert float(((dz[0, :5001].double() - exact) / exact).abs().max()) <= 2e-7
    assert dz[0, 5000] == 1.0 and bool((dz[0, 5001:5003] < 1e-37).all()) and bool(dz[0, 5003].isnan())
