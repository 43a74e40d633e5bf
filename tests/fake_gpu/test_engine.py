"""The rollout engine on CUDA: it starts, takes weights, samples, sleeps and wakes, with both of vLLM's runners."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.engine_life import NEW_TOKENS, PROMPTS
from tests.fake_gpu.environment import ROOT, Environment
from tests.fake_gpu.launch import run_program

STUDENT = ROOT / "examples" / "quickstart" / "student"
CASES = [*itertools.product(("vllm-0.33", "vllm-0.32"), ("1", "0"), (True, False))]


@pytest.mark.parametrize(("pair", "runner_v2", "asynchronous"), CASES)
def test_engine_life(
    pairs: dict[str, Environment], tmp_path: Path, pair: str, runner_v2: str, asynchronous: bool
) -> None:
    """Every sampled position has its statistics, also with one sample past the stop token and prompts in pieces."""
    report = run_program(
        pairs[pair],
        "engine_life",
        tmp_path,
        settings={"VLLM_USE_V2_MODEL_RUNNER": runner_v2},
        model=str(STUDENT),
        rollout={"async_scheduling": asynchronous},
    )
    runner = f"model runner V{1 + int(runner_v2)} (VLLM_USE_V2_MODEL_RUNNER={runner_v2})"
    assert f"{runner}, {'a' if asynchronous else ''}synchronous scheduling" in report["setup"]
    check_rounds(report)


def test_v2_is_the_default(pairs: dict[str, Environment], tmp_path: Path) -> None:
    """What a user gets who sets nothing; weights in FP8, which vLLM quantises at every synchronisation."""
    report = run_program(
        pairs["vllm-0.33"], "engine_life", tmp_path, model=str(STUDENT), rollout={"quantization": "fp8"}
    )
    assert "model runner V2 (vLLM's choice), asynchronous scheduling" in report["setup"]
    check_rounds(report)


def check_rounds(report: dict[str, Any]) -> None:
    """Two equal lives: responses whole, memory given back, one GPU touched."""
    assert len(report["rounds"]) == 2 and report["version"] == 1
    for generations in report["rounds"]:
        assert len(generations) == len(PROMPTS)
        assert any(g["finished"] for g in generations)
        for generation in generations:
            length = len(generation["tokens"])
            assert generation["statistics"] == [length] * 3
            assert length == NEW_TOKENS or generation["finished"]
    # The KV cache of a quarter of a GiB and the weights are gone in sleep.
    assert report["memory"]["awake"] - report["memory"]["asleep"] > 250
    assert report["contexts"] == [0]
    # torch says so when it saves the random state of every GPU of the machine.
    assert not [text for text in report["warnings"] if "available devices" in text]
