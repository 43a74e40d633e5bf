"""Whole runs of objectives that need more than tokens: rewards in groups, a reference model, a privileged teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sead_megatron.records import read_records
from tests.integration.jobs import run_job, write_job
from tests.tiny_inputs import write_jsonl

SAMPLES = 3
RUNS = {
    "grpo": [
        "objective={name: grpo, reference_kl: 0.04, distillation: 0.5, overlong_buffer: 8}",
        "reference={path: STUDENT, parallel: {tensor: 2}}",
        f"rollout.samples_per_prompt={SAMPLES}",
    ],
    "egrsd": [
        "objective={name: egrsd, look_ahead: 2, importance_clip: 5.0}",
        'teacher.context="{problem} is {solution} , so {problem}"',
        "rollout.temperature=0.8",
        "teacher.parallel={tensor: 1, pipeline: 2}",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(tmp_path: Path, name: str) -> None:
    config = write_job(
        tmp_path,
        steps=2,
        data={"prompts_per_step": 8},
        rollout={"temperature": 1.0},
        evaluation={"every": 0},
        checkpoint={"every": 2},
    )
    prompts = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "train.jsonl", [prompt | {"solution": "n1 plus n2 is n3"} for prompt in prompts])
    overrides = [override.replace("STUDENT", str(tmp_path / "student")) for override in RUNS[name]]
    ended = run_job(config, 2, *overrides)
    assert ended.returncode == 0, ended.output[-4000:]
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped_steps"] == 0
        assert 0 < record["tokens/active"] <= record["tokens/response"]
        assert record["rollout/logprob_diff_max"] <= 1e-3
    if name == "egrsd":
        # The student's distribution at 1 against what it was sampled from, at 0.8: sharper, so mostly below 1.
        assert 0.1 < records[0]["importance/mean"] < 1.5
        assert 0.5 < records[0]["gate/mean"] < 1
        state = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
        assert state["objective"]["count"] == 16
    else:
        rollouts = read_records(tmp_path / "run/rollouts/step_1.jsonl")
        ids = [rollout["prompt_id"] for rollout in rollouts]
        assert ids[:SAMPLES] == [ids[0]] * SAMPLES and ids[SAMPLES] != ids[0]
        assert len({tuple(rollout["tokens"]) for rollout in rollouts[:SAMPLES]}) > 1
