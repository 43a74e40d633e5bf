"""Speed of the training step: what it divides by what."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.parallel.layout import Layout
from sead_megatron.training import throughput as module
from sead_megatron.training.flops import matmul_parameters
from sead_megatron.training.step_plan import plan_step
from tests.tiny_models import fixed_rollout

CONFIGS = Path(__file__).parents[1] / "hf_configs"

# 20 s, of which 9 s are training and 4 s of these arithmetic of the models.
TIMES = {
    "time/rollout": 4.5,
    "time/teacher": 1.0,
    "time/stats": 0.5,
    "time/update": 2.5,
    "time/evaluation": 8.0,
    "time/checkpoint": 3.0,
    "time/other": 0.5,
    "time/step": 20.0,
}


@pytest.mark.parametrize("measured", [False, True])
def test_evaluation_and_checkpoint_do_not_slow_a_step(
    measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 1e9
    monkeypatch.setattr(module, "device_peak_flops", lambda device: peak)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    small, large = (read_hf_config(CONFIGS / name) for name in ("nemotron_nano_8b", "nemotron_super_49b"))
    # Prompts of 2 and 3 tokens, responses of 4 and 5; the second teacher scores nothing.
    plan = plan_step([fixed_rollout([5] * p, [7] * r) for p, r in ((2, 4), (3, 5))], Layout(1, 1, 1), [0, 0])
    models: Any = SimpleNamespace(
        student=SimpleNamespace(model=SimpleNamespace(config=small)),
        teachers=SimpleNamespace(members=[SimpleNamespace(config=large), SimpleNamespace(config=small)]),
        reference=SimpleNamespace(config=small),
    )
    speed = module.throughput(TIMES, plan, models, torch.device("cpu"), measured=measured)
    student, teacher = matmul_parameters(small), matmul_parameters(large)
    flops = 14 * ((8 if measured else 6) * student + 2 * teacher + 2 * student)
    assert speed == {
        "tokens_per_second": pytest.approx(9 / 9.0),
        "mfu": pytest.approx(flops / (4.0 * peak * 2)),
    }


def test_no_peak_no_mfu() -> None:
    plan = plan_step([fixed_rollout([5], [7] * 18)], Layout(1, 1, 1))
    nothing: Any = None
    assert module.throughput(TIMES, plan, nothing, torch.device("cpu"), measured=False) == {
        "tokens_per_second": 2.0
    }
