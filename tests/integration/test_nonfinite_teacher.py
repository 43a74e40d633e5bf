"""A teacher with one NaN in its last norm: the run says whose it is, at once and when it gives up."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sead_megatron.records import read_records
from tests.integration.jobs import run_job, write_job


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sead", "opd"])
def test_a_nan_in_the_last_norm(tmp_path: Path, objective: str) -> None:
    """Every token's hidden state has a NaN then. The step before the last allowed one is skipped and recorded."""
    config = write_job(
        tmp_path,
        objective={"name": objective},
        optimizer={"max_skipped_steps": 1},
        checkpoint={"every": 100},
        evaluation={"prompts": None, "every": 0},
    )
    weights = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    ended = run_job(config, 2)
    assert ended.returncode == 1, ended.output[-4000:]
    (record,) = read_records(tmp_path / "run/metrics.jsonl")
    tokens = int(record["tokens/response"])
    assert (record["skipped_steps"], record["teacher/nonfinite_tokens"]) == (1, tokens)
    said = f"the teacher {tmp_path}/teacher gave non-finite hidden states"
    first = f"{said} for {tokens} of {tokens} response tokens, first in the response to prompt 'p"
    assert ended.output.count(f"WARNING step 1: {first}") == 1
    skipped = "2 steps in a row had a non-finite loss or gradient (loss nan, gradient norm nan)"
    assert f"RuntimeError: {skipped}; the cause: {said}" in ended.output
