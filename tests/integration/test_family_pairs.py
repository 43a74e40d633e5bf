"""The whole loop from the command line for a pair of each model family, in different layouts on the same ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.jobs import WORDS, run_job, write_job
from tests.tiny_families import SAVE_TINY
from tests.tiny_models import save_tiny_llama

STUDENT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
TEACHER: dict[str, Any] = {"vocab_size": len(WORDS), "max_position_embeddings": 512}
# Student at TP2 with sequence parallelism; the teacher's two stages hold 2 and 4 layers where these differ.
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "nemotron_nas": ("llama", {"head_dim": 32, "num_hidden_layers": 2}, {"pipeline": 2}, 2),
    "olmo3": ("olmo3", {}, {"tensor": 2}, 1),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {"pipeline": 2, "stages": [1, 3]}, 2),
}

# ModelOpt's scales over a teacher in two stages, under a student at TP2.
TEACHER_PRECISION = {"qwen3": "modelopt_fp8"}


@pytest.mark.slow
@pytest.mark.parametrize("family", PAIRS)
def test_a_pair_trains(tmp_path: Path, family: str) -> None:
    """Two steps and an evaluation; engine and trainer agree on every sampled token of both steps."""
    name, changes, teacher_layout, student_tensor = PAIRS[family]
    config = write_job(
        tmp_path,
        steps=2,
        student={"parallel": {"tensor": student_tensor}},
        teacher={"parallel": teacher_layout},
        precision={"student": "float32", "teacher": TEACHER_PRECISION.get(family, "float32")},
        rollout={"tensor_parallel": student_tensor},
        evaluation={"every": 0},
        checkpoint={"every": 2},
    )
    save_student = save_tiny_llama if name == "llama" else SAVE_TINY[name]
    save_student(tmp_path / "student", seed=1, **(STUDENT | changes))
    (tmp_path / "teacher" / "model.safetensors").unlink()
    (tmp_path / "teacher" / "config.json").unlink()
    SAVE_TINY[family](tmp_path / "teacher", seed=2, **TEACHER)
    ended = run_job(config, 2)
    assert ended.returncode == 0, ended.output[-4000:]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["rollout/logprob_diff_max"] <= 1e-3, record
        assert record["loss"] > 0 and record["grad_norm"] > 0, record
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()
