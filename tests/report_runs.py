"""Run directories for the report's tests, through the writers that a run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sead_megatron.config import TrainConfig
from sead_megatron.run_directory import RunDirectory
from tests.tiny_inputs import minimal


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    """A step's metrics, with the keys that every part of the page reads."""
    return {
        "step": step,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "alpha": 0.8 - 0.1 * step,
        "lambda_fkl": 2.0,
        "zone/a_share": 0.5,
        "zone/a_fkl_share": 0.1,
        "zone/b_fkl_share": 0.6,
        "zone/c_fkl_share": 0.3,
        "zone/threshold_teacher": 0.5,
        "zone/threshold_a_teacher": 0.01,
        "zone/threshold_a_student": 0.02,
        "entropy/student": 0.3,
        "entropy/teacher": 0.2,
        "tokens/response": 40,
        "rollout/logprob_diff_mean": 1e-6,
        "rollout/logprob_diff_max": 1e-5,
        "time/rollout": 3.0,
        "time/update": 1.0,
        "memory/peak_bytes": 2**30,
    } | changes


def rollout_record(texts: list[str], **changes: Any) -> dict[str, Any]:
    """A sampled rollout of these tokens, with made-up numbers that differ from token to token."""
    count = len(texts)
    return {
        "prompt_id": "p0",
        "prompt": [{"role": "user", "content": "one plus two"}],
        "response": "".join(texts),
        "answer": "3",
        "reward": 1.0,
        "finished": True,
        "weight_version": 0,
        "tokens": list(range(count)),
        "token_texts": texts,
        "logprobs": [-0.1 * i for i in range(count)],
        "zones": "".join("ABC"[i % 3] for i in range(count)),
        "student_entropy": [0.01 * (i + 1) for i in range(count)],
        "teacher_entropy": [0.02 * (count - i) for i in range(count)],
        "forward_kl": [0.1 * i for i in range(count)],
        "reverse_kl": [0.05 * i for i in range(count)],
    } | changes


def write_run(
    directory: Path, rollouts: dict[int, list[dict[str, Any]]] | None = None, steps: int = 4, **config: Any
) -> RunDirectory:
    """A run of `steps` steps of 4 with two evaluations, whose rollouts are these."""
    directory.mkdir(parents=True, exist_ok=True)
    run = RunDirectory.open(TrainConfig.model_validate(minimal(directory) | config))
    for step in range(1, steps + 1):
        run.append_metrics(step_record(step))
    for step, correct in ((0, 4), (steps, 8)):
        run.append_evaluation({"step": step, "accuracy": correct / 16, "correct": correct, "total": 16})
    for step, records in (rollouts or {}).items():
        run.write_rollouts(step, records)
    return run
