"""Whole runs of objectives that need more than tokens: rewards in groups, a reference model, a privileged teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sead_megatron.records import read_records
from tests.integration.jobs import ROOT, run_job
from tests.tiny_inputs import write_jsonl

PAIR = ROOT / "examples/quickstart"
SAMPLES = 3
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {
        "objective": {"name": "grpo", "reference_kl": 0.04, "distillation": 0.5, "overlong_buffer": 8},
        "reference": {"path": str(PAIR / "student"), "parallel": {"tensor": 2}},
        "rollout": {"temperature": 1.0, "samples_per_prompt": SAMPLES},
    },
    "egrsd": {
        "objective": {"name": "egrsd", "look_ahead": 2, "importance_clip": 5.0},
        "teacher": {
            "context": "{problem} The answer is {solution}.",
            "parallel": {"tensor": 1, "pipeline": 2},
        },
        "rollout": {"temperature": 0.8},
    },
}


def _write_job(directory: Path, changes: dict[str, Any]) -> Path:
    """The quick start with few prompts, two steps and `changes`; solutions are the answers."""
    config = yaml.safe_load((PAIR / "config.yaml").read_text())
    config |= {"run_dir": str(directory / "run"), "steps": 2, "metrics": {}, "checkpoint": {"every": 2}}
    config["optimizer"]["warmup_steps"] = 0
    for model in ("student", "teacher"):
        config[model]["path"] = str(PAIR / model)
    lines = (PAIR / "prompts_train.jsonl").read_text().splitlines()[:64]
    prompts = [json.loads(line) for line in lines]
    write_jsonl(directory / "prompts.jsonl", [prompt | {"solution": prompt["answer"]} for prompt in prompts])
    config["data"] = {"prompts": str(directory / "prompts.jsonl"), "prompts_per_step": 16}
    config["curriculum"], config["evaluation"] = {"name": "uniform"}, {}
    for section, values in changes.items():
        replaced = section == "objective"
        config[section] = values if replaced else config.get(section, {}) | values
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_run(tmp_path: Path, name: str) -> None:
    ended = run_job(_write_job(tmp_path, RUNS[name]), 2)
    assert ended.returncode == 0, ended.output[-4000:]
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped_steps"] == 0
        assert 0 < record["tokens/active"] <= record["tokens/response"]
        assert record["rollout/logprob_diff_max"] <= 1e-3
        assert 0 < record["rollout/pass_rate"] < 1
    if name == "egrsd":
        # The distribution at 1 over the one that was sampled, at 0.8: below 1 where the student is sure.
        assert 0.5 < records[0]["importance/mean"] < 1.5
        assert 0.9 <= records[0]["gate/mean"] <= 1  # gamma 0.1
        state = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
        assert state["objective"]["count"] == 32
    else:
        lines = (tmp_path / "run/rollouts/step_1.jsonl").read_text().splitlines()
        rollouts = [json.loads(line) for line in lines]
        ids = [rollout["prompt_id"] for rollout in rollouts]
        assert ids[:SAMPLES] == [ids[0]] * SAMPLES and ids[SAMPLES] != ids[0]
        assert len({tuple(rollout["tokens"]) for rollout in rollouts[:SAMPLES]}) > 1
