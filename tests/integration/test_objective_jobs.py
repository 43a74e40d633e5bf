"""Whole runs of objectives that need more than tokens: rewards in groups, a reference model, a privileged teacher, a
teacher for each domain."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sead_megatron.metrics import deterministic_keys
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.stored_tensors import find_parameters, read_metadata
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
    "grpo without a teacher": {
        "objective": {"name": "grpo"},
        "teacher": {},
        "metrics": {"full_stats_every": 1},
        "rollout": {"temperature": 1.0, "samples_per_prompt": SAMPLES},
    },
    "drkl": {"objective": {"name": "drkl"}, "rollout": {"temperature": 1.0}},
    "mopd": {
        "objective": {"name": "mopd"},
        # At first the student is its own teacher of sums.
        "teacher": {"domains": {"sums": str(PAIR / "student")}},
        "rollout": {"temperature": 1.0, "samples_per_prompt": SAMPLES},
    },
}


def write_quickstart_job(directory: Path, changes: dict[str, Any]) -> Path:
    """The quick start with few prompts, two steps and `changes`; solutions are the answers, domains two in turn."""
    config = yaml.safe_load((PAIR / "config.yaml").read_text())
    config |= {"run_dir": str(directory / "run"), "steps": 2, "metrics": {}, "checkpoint": {"every": 2}}
    config["optimizer"]["warmup_steps"] = 0
    for model in ("student", "teacher"):
        config[model]["path"] = str(PAIR / model)
    lines = (PAIR / "prompts_train.jsonl").read_text().splitlines()[:64]
    prompts = [json.loads(line) for line in lines]
    for i, prompt in enumerate(prompts):
        prompt |= {"solution": prompt["answer"], "domain": ("sums", "products")[i % 2]}
    write_jsonl(directory / "prompts.jsonl", prompts)
    config["data"] = {"prompts": str(directory / "prompts.jsonl"), "prompts_per_step": 16}
    config["curriculum"], config["evaluation"] = {"name": "uniform"}, {}
    for section, values in changes.items():
        replaced = section == "objective" or not isinstance(values, dict)
        config[section] = values if replaced or not values else config.get(section, {}) | values
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# The others go to make test-slow: their gradients and their updates in several layouts are tested elsewhere.
_OF_MINUTES = ("grpo", "egrsd", "drkl")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _OF_MINUTES else []) for name in RUNS]
)
def test_a_run(tmp_path: Path, name: str) -> None:
    ended = run_job(write_quickstart_job(tmp_path, RUNS[name]), 2)
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
    elif name == "grpo without a teacher":
        state = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
        assert state["teacher"]["path"] is None
        assert not [key for record in records for key in record if key.startswith(("kl/", "entropy/teacher"))]
        assert all(record["entropy/student"] > 0 for record in records)
    elif name == "drkl":
        assert all(record["kl/reverse"] > 0 for record in records)
    elif name == "mopd":
        _check_domains(tmp_path / "run", records)
    else:
        lines = (tmp_path / "run/rollouts/step_1.jsonl").read_text().splitlines()
        rollouts = [json.loads(line) for line in lines]
        ids = [rollout["prompt_id"] for rollout in rollouts]
        assert ids[:SAMPLES] == [ids[0]] * SAMPLES and ids[SAMPLES] != ids[0]
        assert len({tuple(rollout["tokens"]) for rollout in rollouts[:SAMPLES]}) > 1


def _check_domains(run: Path, records: list[dict[str, Any]]) -> None:
    """In the first step tokens of sums have the student's own entropies as the teacher's, other tokens have not."""
    assert abs(records[0]["domain/sums/reverse_kl"]) <= 1e-5
    assert records[0]["domain/products/reverse_kl"] > 0.01
    # One step on, the student is no longer its teacher.
    assert abs(records[1]["domain/sums/reverse_kl"]) > 1e-4
    assert 0.99 < records[0]["importance/mean"] < 1.01 and records[0]["importance/clipped"] == 0
    largest: dict[bool, list[float]] = {True: [], False: []}
    for line in (run / "rollouts/step_1.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        pairs = zip(rollout["teacher_entropy"], rollout["student_entropy"], strict=True)
        is_sum = int(rollout["prompt_id"].removeprefix("train-")) % 2 == 0
        largest[is_sum].append(max(abs(theirs - own) for theirs, own in pairs))
    assert max(largest[True]) <= 1e-3 < min(largest[False])


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint, whole."""
    reader = distributed_checkpoint.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.slow
def test_a_teacher_that_follows_the_student(tmp_path: Path) -> None:
    """Checkpoints of four steps hold averages of the student's weights; resumed after two, the rest is equal."""
    decay, follows = 0.9, {"path": str(PAIR / "student"), "ema": 0.9, "parallel": {"tensor": 1}}
    job = write_quickstart_job(tmp_path, {"teacher": follows, "objective": {"name": "opd"}})
    overrides = ["steps=4", "checkpoint.every=1", "checkpoint.keep=4", "rollout.temperature=1.0"]
    ended = run_job(job, 2, *overrides)
    assert ended.returncode == 0, ended.output[-4000:]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    saved = [_tensors(run / f"checkpoints/step_{step:08d}") for step in range(1, 5)]
    averaged = [key for key in saved[0] if key.startswith("teacher.")]
    assert len(averaged) == len(
        [key for key in saved[0] if key.startswith(("decoder", "embedding", "output"))]
    )
    for key in averaged:
        student = [tensors[key.removeprefix("teacher.")].double() for tensors in saved]
        average = saved[0][key].double()
        # What the run started from is what the first average leaves; the rest follows from the student's weights.
        for tensors, weights in zip(saved[1:], student[1:], strict=True):
            average = decay * average + (1 - decay) * weights
            assert torch.allclose(tensors[key].double(), average, rtol=0, atol=5e-7), key
        assert float((saved[3][key] - saved[0][key]).abs().max()) > 1e-5, key
    records = read_records(run / "metrics.jsonl")
    # The first step is the student against itself.
    assert abs(records[0]["kl/reverse"]) <= 1e-6 and records[3]["kl/reverse"] > 0
    # Whoever reads the student out of a checkpoint finds it, and no more.
    checkpoint = run / "checkpoints/step_00000004"
    found = find_parameters(checkpoint, read_hf_config(PAIR / "student"), read_metadata(checkpoint))
    assert {parameter.key for parameter in found} == {key.removeprefix("teacher.") for key in averaged}
    shutil.copytree(run, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / f"checkpoints/step_{step:08d}")
    ended = run_job(job, 2, *overrides, f"run_dir={resumed}")
    assert ended.returncode == 0, ended.output[-4000:]
    again = read_records(resumed / "metrics.jsonl")
    for key in deterministic_keys():
        assert [r.get(key) for r in again] == [r.get(key) for r in records], key
    for key, tensor in _tensors(resumed / "checkpoints/step_00000004").items():
        assert torch.equal(tensor, saved[3][key]), key
