"""What vLLM's CUDA runners generate, and what the sampler tap says of it, against transformers, number for number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_gpu.environment import Environment
from tests.fake_gpu.launch import COMPUTING, run_program
from tests.tiny_models import save_tiny_llama

# Of float32 logprobs and entropies, nats: other kernels for attention and other orders of sums. Seen: 2.5e-6.
TOLERANCE = 1e-4
RUNNERS = {"V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "V2": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but for heads as wide as vLLM's attention wants them; its kernels take seconds in the interpreter."""
    shape = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return save_tiny_llama(tmp_path_factory.mktemp("model"), **shape)


@pytest.mark.parametrize(
    ("pair", "runner", "asynchronous"),
    [("vllm-0.33", "V2", True), ("vllm-0.33", "V1", False), ("vllm-0.32", "V2", False)],
)
def test_rollouts_are_transformers(
    pairs: dict[str, Environment], model: Path, tmp_path: Path, pair: str, runner: str, asynchronous: bool
) -> None:
    """Greedy tokens are the likeliest, logprobs and entropies equal, and a sleep with new weights changes nothing."""
    report = run_program(
        pairs[pair],
        "computed_rollout",
        tmp_path,
        settings=COMPUTING | RUNNERS[runner],
        model=str(model),
        asynchronous=asynchronous,
    )
    scheduling = "asynchronous" if asynchronous else "synchronous"
    assert f"model runner {runner}" in report["setup"] and f"{scheduling} scheduling" in report["setup"]
    first, second = report["rounds"]
    assert first == second
    assert first["greedy"]["not the likeliest"] == 0 and first["sampled"]["not the likeliest"] > 0
    for generated in first.values():
        assert max(generated["logprobs"], generated["entropies"]) <= TOLERANCE, generated
