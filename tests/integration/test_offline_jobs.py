"""Whole runs on responses that were there before: a cache is made, trained on without engine and teacher, resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sead_megatron.data.mixture import is_own_batch
from sead_megatron.data.types import FIXED_RESPONSE
from sead_megatron.metrics import deterministic_keys
from sead_megatron.models.tokenizer import load_tokenizer
from sead_megatron.records import read_records
from tests.integration.jobs import run_command, run_job
from tests.integration.test_objective_jobs import PAIR, write_quickstart_job
from tests.tiny_inputs import write_jsonl

STEPS = 4
# Of float32 logprobs, between Megatron at TP2 in packed rows and transformers one by one.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of two responses a prompt, and its cache, made on two ranks."""
    directory = tmp_path_factory.mktemp("offline")
    path = write_quickstart_job(
        directory,
        {
            "steps": STEPS,
            "objective": {"name": "lightning"},
            "data": {"cache": str(directory / "cache")},
            "rollout": {"temperature": 1.0, "samples_per_prompt": 2},
            "checkpoint": {"every": 2},
        },
    )
    ended = run_command(["cache", str(path), "--nproc-per-node=2"], directory / "cache.log")
    assert ended.returncode == 0, ended.output[-4000:]
    return path


def read_part(path: Path, part: int) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path.parent / f"cache/part_{part:05d}.arrow"))).read_all()


def sequence_logprobs(model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """log p of the response's tokens by transformers, a sequence at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
    return np.asarray(logprobs[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None])[:, 0])


def test_cached_logprobs_are_the_models(job: Path) -> None:
    """The teacher's, and those of the student that sampled, of 32 responses against transformers."""
    from transformers import AutoModelForCausalLM

    models = {
        column: AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32)
        for column, name in (("teacher_logprobs", "teacher"), ("logprobs", "student"))
    }
    rows = read_part(job, 1).to_pylist()
    assert [row["sample"] for row in rows] == [0, 1] * 16 and len({row["id"] for row in rows}) == 16
    assert any(a["response_ids"] != b["response_ids"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    for row in rows:
        prompt, response = (np.asarray(row[name]) for name in ("prompt_ids", "response_ids"))
        for column, model in models.items():
            expected = sequence_logprobs(model, prompt, response)
            np.testing.assert_allclose(row[column], expected, atol=TOLERANCE, rtol=0)


def test_training_needs_no_teacher_and_no_engine(job: Path) -> None:
    """Killed after step 2's checkpoint and started again: the numbers of a run that nobody killed."""
    moved = f"teacher.path={job.parent}/gone"
    whole = run_job(job, 2, moved)
    assert whole.returncode == 0, whole.output[-4000:]
    assert "no teacher, no engine" in whole.output and "starting the rollout engine" not in whole.output
    records = read_records(job.parent / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped_steps"] == 0
        assert record["weight_version"] == 0
    assert records[0]["rollout/logprob_diff_max"] <= 1e-4 and abs(records[0]["cache/drift"]) <= 1e-5
    assert "rollout/logprob_diff_max" not in records[1] and records[3]["cache/drift"] > 1e-3

    update = {"module": "sead_megatron.training.optimizer", "attribute": "StudentOptimizer.step", "call": 3}
    run = job.parent / "killed"
    killed = run_job(job, 2, moved, f"run_dir={run}", fault=update)
    assert killed.returncode == -9, killed.output[-3000:]
    resumed = run_job(job, 2, moved, f"run_dir={run}")
    assert resumed.returncode == 0, resumed.output[-4000:]
    for ours, theirs in zip(read_records(run / "metrics.jsonl"), records, strict=True):
        assert {k: ours.get(k) for k in deterministic_keys()} == {
            k: theirs.get(k) for k in deterministic_keys()
        }
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step}.jsonl"
        assert (run / name).read_text() == (job.parent / "run" / name).read_text()
    asked = [
        {
            json.loads(line)["prompt_id"]
            for line in (run / f"rollouts/step_{step}.jsonl").read_text().splitlines()
        }
        for step in range(1, STEPS + 1)
    ]
    assert all(a.isdisjoint(b) for i, a in enumerate(asked) for b in asked[:i])  # one pass of the curriculum


@pytest.mark.slow
def test_a_cache_is_continued_with_the_same_bytes(job: Path) -> None:
    parts = sorted((job.parent / "cache").glob("part_*.arrow"))
    before = [part.read_bytes() for part in parts]
    parts[1].unlink()
    ended = run_command(["cache", str(job), "--nproc-per-node=2"], job.parent / "again.log")
    assert ended.returncode == 0, ended.output[-4000:]
    assert [part.read_bytes() for part in parts] == before
    assert len(parts) == 4


def trained_tokens(run: Path, step: int) -> list[tuple[str, list[int]]]:
    lines = (run / f"rollouts/step_{step}.jsonl").read_text().splitlines()
    return [(record["prompt_id"], record["tokens"]) for record in map(json.loads, lines)]


@pytest.mark.slow
def test_gkd_on_rollouts_and_fixed_responses(tmp_path: Path) -> None:
    """The coin's batches hold the solutions, the others do not; it falls the same after a kill."""
    changes = {
        "steps": 5,
        "objective": {"name": "gkd", "student_share": 0.5},
        "rollout": {"temperature": 1.0},
        "checkpoint": {"every": 1},
    }
    job, run = write_quickstart_job(tmp_path, changes), tmp_path / "run"
    update = {"module": "sead_megatron.training.optimizer", "attribute": "StudentOptimizer.step", "call": 3}
    killed = run_job(job, 2, fault=update)
    assert killed.returncode == -9, killed.output[-3000:]
    resumed = run_job(job, 2)
    assert resumed.returncode == 0, resumed.output[-4000:]
    records = read_records(run / "metrics.jsonl")
    own = [is_own_batch(1234, step, 0.5) for step in range(5)]
    assert [record["weight_version"] for record in records] == [
        step if own[step] else FIXED_RESPONSE for step in range(5)
    ]
    assert any(own) and not all(own)
    tokenizer = load_tokenizer(PAIR / "student")
    solutions = {
        line["id"]: [*tokenizer.encode_text(line["solution"]), tokenizer.eos_ids[0]]
        for line in map(json.loads, (tmp_path / "prompts.jsonl").read_text().splitlines())
    }
    for step, record in enumerate(records):
        trained = trained_tokens(run, step + 1)
        assert all(tokens == solutions[name] for name, tokens in trained) == (not own[step])
        assert ("rollout/logprob_diff_max" in record) == ("rollout/pass_rate" in record) == own[step]
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0


@pytest.mark.slow
def test_fixed_responses_alone_in_two_layouts(tmp_path: Path) -> None:
    """No engine is started, and neither loss nor gradient depends on the layout, with turns of a user masked."""
    changes = {"steps": 2, "objective": {"name": "gkd", "student_share": 0}, "checkpoint": {"every": 2}}
    job = write_quickstart_job(tmp_path, changes)
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    said = {}
    for i, prompt in enumerate(prompts):
        own = [f"{prompt['answer']}+0", prompt["solution"]] if i % 2 else [prompt["solution"]]
        said[prompt["id"]] = own
        if len(own) == 2:
            prompt["turns"] = [
                {"role": "assistant", "content": own[0]},
                {"role": "user", "content": "modulo 10?"},
                {"role": "assistant", "content": own[1]},
            ]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    runs = {
        "dp2": ["student.parallel.tensor=1"],
        "tp2": ["student.parallel.tensor=2", "teacher.parallel.tensor=1"],
    }
    records = {}
    for name, layout in runs.items():
        ended = run_job(job, 2, *layout, f"run_dir={tmp_path / name}")
        assert ended.returncode == 0, ended.output[-4000:]
        assert "starting the rollout engine" not in ended.output
        records[name] = read_records(tmp_path / name / "metrics.jsonl")
    tokenizer = load_tokenizer(PAIR / "student")
    trained = trained_tokens(tmp_path / "dp2", 1)
    for name, tokens in trained:
        assert tokens == [
            token for text in said[name] for token in [*tokenizer.encode_text(text), tokenizer.eos_ids[0]]
        ]
    assert {len(said[name]) for name, _ in trained} == {1, 2}
    for ours, theirs in zip(records["dp2"], records["tp2"], strict=True):
        assert ours["tokens/active"] == theirs["tokens/active"] > 0
        for key in ("loss", "grad_norm", "kl/forward"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
