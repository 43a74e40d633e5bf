"""Three-way parity: the reference model, our Megatron model and vLLM agree on greedy output and logprobs.

Each family serves as the student, cut over two ranks in both trainer and engine, beside a teacher whose layers differ
and lie in two pipeline stages. A second round follows an update, so that the weight stream of the family is at work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_families import SAVE_TINY, attention_block, ffn_block, save_tiny_nemotron_nas

# Float32 in all three; measured 4e-6 at most.
TOLERANCE = 1e-4
# vLLM's CPU attention takes heads of 32 and more.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
SERVED_BLOCKS = [
    {"attention": attention_block(2), "ffn": ffn_block(2.0)},
    {"attention": attention_block(no_op=True), "ffn": ffn_block(4.0)},
    {"attention": attention_block(1), "ffn": ffn_block(None, no_op=True)},
    {"attention": attention_block(2), "ffn": ffn_block(2.0)},
]
CHANGES: dict[str, dict[str, Any]] = {
    "nemotron_nas": {"head_dim": 32, "block_configs": SERVED_BLOCKS},
    "olmo3": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "nemotron_nas" else [pytest.mark.slow]) for name in CHANGES],
)
def test_engine_trainer_and_reference_agree(family: str, tmp_path: Path) -> None:
    student = SAVE_TINY[family](tmp_path / "student", seed=1, **(SHAPE | CHANGES[family]))
    teacher = save_tiny_nemotron_nas(tmp_path / "teacher", seed=2)
    report = run_ranks(
        "serving",
        2,
        tmp_path,
        student=str(student),
        teacher=str(teacher),
        case={"student": [2, 1], "teacher": [1, 2], "engine": 2},
    )
    first, second = report["rounds"]
    assert first["greedy"] == report["prompts"] == 6, report
    assert first["reference_logprob"] <= TOLERANCE, report
    for measured in (first, second):
        assert measured["tokens"] > 60, report
        assert measured["logprob"] <= TOLERANCE and measured["entropy"] <= TOLERANCE, report
