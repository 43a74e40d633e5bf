"""Difficulty by the real engine: a killed estimate goes on, and no number depends on the kill or on the ranks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.data.difficulty import read_difficulties
from sead_megatron.data.prompts import read_prompts
from sead_megatron.errors import UserError
from sead_megatron.evaluation.grading import grade
from tests.integration import jobs
from tests.integration.jobs import HOOKS, ROOT, write_job
from tests.tiny_inputs import write_jsonl, write_tokenizer_json

SAMPLES = 4
PER_CALL = 8
PROMPTS = 24
# Most words are one of two numbers, so that the last number of random text is right as often as not.
WORDS = [*jobs.WORDS[:6], *(f"{1 + i % 2}.{'0' * (i // 2 + 1)}" for i in range(len(jobs.WORDS) - 6))]


def run_estimate(
    config: Path, out: Path, ranks: int, *extra: str, fault: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SEAD_TEST_JOB": out.stem}
    if fault is not None:
        environment["SEAD_TEST_FAULT"] = json.dumps({"rank": 0, "action": "kill"} | fault)
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tools/estimate_difficulty.py", str(config), str(out), *extra]
    command += [f"--samples={SAMPLES}", f"--prompts-per-call={PER_CALL}", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config.yaml, difficulty file of an uninterrupted estimate on 2 ranks)."""
    directory = tmp_path_factory.mktemp("estimate")
    config = write_job(directory, curriculum={"difficulty": str(directory / "whole.jsonl")})
    for name in ("student", "teacher"):
        write_tokenizer_json(directory / name, WORDS)
    prompts = [
        {"id": f"p{i}", "prompt": f"{WORDS[6 + i]} plus {WORDS[7 + i]}", "answer": "1"}
        for i in range(PROMPTS)
    ]
    write_jsonl(directory / "train.jsonl", prompts)
    whole = directory / "whole.jsonl"
    ended = run_estimate(config, whole, 2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return config, whole


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_is_what_a_run_reads(job: tuple[Path, Path]) -> None:
    config, whole = job
    check_config(load_config(config), 2)
    prompts = read_prompts(config.parent / "train.jsonl")
    told = read_difficulties(whole, prompts)
    assert list(told.values) == [f"p{i}" for i in range(PROMPTS)]
    assert {value * SAMPLES for value in told.values.values()} <= set(range(SAMPLES + 1))
    assert len(set(told.values.values())) >= 3, "pass rates that are all the same would show nothing below"
    assert told.provenance is not None
    assert (told.provenance["samples"], told.provenance["seed"]) == (SAMPLES, 1234)
    assert told.provenance["sampling"]["temperature"] == 0.7
    student = hashlib.sha256((config.parent / "student" / "config.json").read_bytes()).hexdigest()
    assert told.provenance["config_sha256"] == student
    grading = hashlib.sha256((ROOT / "sead_megatron/evaluation/grading.py").read_bytes()).hexdigest()
    assert told.provenance["grader"]["grading_sha256"] == grading


@pytest.mark.slow
def test_pass_rates_are_those_of_the_student(job: tuple[Path, Path]) -> None:
    """Another way to the same numbers: transformers' own sampling. Its random numbers are others, so means agree."""
    config, whole = job
    measured = sum(entry["difficulty"] for entry in _lines(whole)[1:]) / PROMPTS
    rate, count = reference_pass_rate(config.parent)
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(1 - measured - rate) < 4 * spread * (1 / count + 1 / (PROMPTS * SAMPLES)) ** 0.5


def reference_pass_rate(directory: Path) -> tuple[float, int]:
    """(pass rate, samples) of the student by transformers' own sampling."""
    import torch
    from transformers import AutoModelForCausalLM

    from sead_megatron.models.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32)
    tokenizer = load_tokenizer(directory / "student")
    passed = count = 0
    torch.manual_seed(0)
    for prompt in read_prompts(directory / "train.jsonl"):
        ids = torch.tensor([tokenizer.encode_messages(prompt.messages)] * 6)
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.7,
            top_k=0,
            max_new_tokens=16,
        )
        for row in rows[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in tokenizer.eos_ids), len(row) - 1)
            passed += grade(tokenizer.decode(row[: end + 1]), "1")
            count += 1
    return passed / count, count


@pytest.mark.slow
def test_killed_and_continued(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after the second batch is written, then with half of a line more, as a kill in a write leaves it."""
    config, whole = job
    out = tmp_path / "killed.jsonl"
    fault = {"module": "sead_megatron.evaluation.difficulty_file", "attribute": "DifficultyFile.append"}
    ended = run_estimate(config, out, 2, fault=fault | {"call": 2, "action": "kill after"})
    assert ended.returncode == -9, ended.stderr[-3000:]
    assert len(_lines(out)) == 1 + 2 * PER_CALL
    # As if the second batch had been cut: its whole lines are measured again, together with the others.
    out.write_bytes(out.read_bytes()[:-10])
    ended = run_estimate(config, out, 2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"going on after {2 * PER_CALL - 1} of {PROMPTS} prompts" in ended.stdout
    assert out.read_text() == whole.read_text()
    ended = run_estimate(config, out, 2)
    assert (ended.returncode, ended.stdout) == (0, f"{out} is complete: {PROMPTS} prompts\n")


@pytest.mark.slow
def test_another_number_of_ranks(job: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = job
    out = tmp_path / "one.jsonl"
    ended = run_estimate(config, out, 1)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert out.read_text() == whole.read_text()


def test_refusals(job: tuple[Path, Path], tmp_path: Path) -> None:
    """One line, exit code 2, and the file as it was."""
    config, whole = job
    before = whole.read_bytes()
    ended = run_estimate(config, whole, 2, "seed=5", "rollout.temperature=1.0")
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: {whole}, line 1: belongs to another estimate: sampling, seed differ; "
        "choose another OUT, or remove it to estimate again\n"
    )
    assert whole.read_bytes() == before
    ended = run_estimate(config, tmp_path / "none" / "out.jsonl", 2)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "its directory does not exist" in ended.stderr
    unanswered = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "1.0"}])
    ended = run_estimate(
        config, tmp_path / "out.jsonl", 2, f"data.prompts={unanswered}", "data.prompts_per_step=1"
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "1 of 1 prompts have no answer to grade by: a" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_refuses_the_difficulty_of_other_prompts(job: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = job
    prompts = _lines(config.parent / "train.jsonl")
    prompts[3]["answer"] = "2"
    changed = write_jsonl(tmp_path / "train.jsonl", prompts)
    with pytest.raises(UserError) as error:
        check_config(load_config(config, [f"data.prompts={changed}"]), 2)
    assert "was estimated for other prompts" in str(error.value)
