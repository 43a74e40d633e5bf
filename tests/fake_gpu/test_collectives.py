"""torch's collectives over the fake NCCL, between real processes: what the rehearsals of several ranks rest on."""

from __future__ import annotations

import pytest

from tests.fake_gpu.environment import Environment
from tests.fake_gpu.launch import run_command, torchrun


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pair", ["vllm-0.33", "vllm-0.32"])
def test_torch_collectives(pairs: dict[str, Environment], pair: str, ranks: int) -> None:
    """Every collective, point to point and groups, to the bit."""
    ended = run_command(pairs[pair], torchrun("torch_collectives", ranks), {}, 300)
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert f"torch collectives OK, {ranks} ranks" in ended.stdout
