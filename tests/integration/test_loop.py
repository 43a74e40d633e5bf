"""The whole loop from the command line: what a run leaves behind, in several layouts, dtypes and objectives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sead_megatron.metrics import PHASES, check_keys
from sead_megatron.records import read_records
from tests.integration.jobs import run_job, write_job

# design: metric keys that every SEAD step has.
SEAD_KEYS = {
    *("step", "loss", "grad_norm", "lr", "alpha", "skipped_steps", "weight_version", "memory/peak_bytes"),
    *(f"zone/{zone}_{share}" for zone in "abc" for share in ("share", "fkl_share")),
    *("zone/threshold_teacher", "entropy/student", "entropy/teacher", "kl/forward", "kl/reverse"),
    *("rollout/length_mean", "rollout/truncated", "rollout/pass_rate"),
    *("rollout/logprob_diff_mean", "rollout/logprob_diff_max"),
    *("curriculum/difficulty_mean", "curriculum/eligible", "tokens_per_second"),
    *(
        f"time/{phase}"
        for phase in ("rollout", "grading", "teacher", "stats", "coefficients", "update", "sync")
    ),
    *("time/record", "time/other", "time/step"),
}


def _check_run(
    run: Path, steps: int, *, keys: set[str] = SEAD_KEYS, logprob_diff: float = 1e-3
) -> list[dict[str, Any]]:
    """The run directory of `steps` steps; returns its records."""
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for record in records:
        check_keys(record)
        assert keys <= set(record), keys - set(record)
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        assert record["weight_version"] == record["step"] - 1
        assert record["skipped_steps"] == 0
        assert record["rollout/logprob_diff_max"] <= logprob_diff
        assert record["entropy/engine_trainer_diff_max"] <= logprob_diff
        _check_times(record)
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == steps
    assert (run / "checkpoints" / f"step_{steps:08d}" / "state.json").exists()
    assert not list((run / "checkpoints").glob("*.partial"))
    for record in records:
        _check_rollouts(run / "rollouts" / f"step_{record['step']}.jsonl", "zone/a_share" in record)
    return records


def _check_times(record: dict[str, Any]) -> None:
    """Every second belongs to a phase, and the speed is that of the step without evaluation and checkpoint."""
    assert sum(record.get(f"time/{phase}", 0.0) for phase in PHASES) == pytest.approx(record["time/step"])
    assert record["time/other"] <= 0.03 * record["time/step"]  # measured: below 0.3 %
    training = record["time/step"] - record.get("time/evaluation", 0.0) - record.get("time/checkpoint", 0.0)
    assert record["tokens_per_second"] == pytest.approx(record["tokens/response"] / training)


def _check_rollouts(path: Path, zoned: bool) -> None:
    rollouts = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rollouts) == 8
    for rollout in rollouts:
        length = len(rollout["tokens"])
        assert 0 < length <= 16
        columns = [
            "logprobs",
            "token_texts",
            "student_entropy",
            *(["zones", "teacher_entropy"] if zoned else []),
        ]
        assert {name: len(rollout[name]) for name in columns} == dict.fromkeys(columns, length)
        assert set(rollout.get("zones", "")) <= set("ABC")
        assert max(rollout["logprobs"]) <= 0


def _check_shares(records: list[dict[str, Any]]) -> None:
    """A, B, C hold 50, 40, 10 % of the response tokens: each count is less than one token off."""
    for record in records:
        for zone, share in zip("abc", (0.5, 0.4, 0.1), strict=True):
            assert abs(record[f"zone/{zone}_share"] - share) * record["tokens/response"] < 1 + 1e-9
        active = 1 - record["zone/a_share"]
        assert record["tokens/active"] == pytest.approx(active * record["tokens/response"])


def test_two_ranks(baseline: tuple[Path, Path]) -> None:
    """Student DP2, teacher TP2, one engine a rank, float32, with evaluations and the learning rate's decay."""
    _, run = baseline
    records = _check_run(run, 6)
    _check_shares(records)
    assert [record["step"] for record in read_records(run / "evaluations.jsonl")] == [0, 3, 6]
    assert [r["evaluation/accuracy"] for r in records if "evaluation/accuracy" in r] == [
        r["accuracy"] for r in read_records(run / "evaluations.jsonl")[1:]
    ]
    assert records[-1]["lr"] < records[0]["lr"]
    assert records[-1]["kl/reverse"] < records[0]["kl/reverse"]
    assert records[0]["alpha"] == pytest.approx(0.8)


@pytest.mark.slow
def test_four_ranks_in_three_layouts(tmp_path: Path) -> None:
    """Student TP2 PP2, teacher TP2 DP2, engines of TP2, a teacher entropy of the top k, and a sampled benchmark.

    The entropy of k tokens and a tail is a lower bound, and it decides the zones, whose shares stay exact.
    """
    config = write_job(
        tmp_path,
        steps=2,
        objective={"name": "sead", "teacher_entropy": "topk", "teacher_topk": 8},
        kernel={"cache_mib": 1, "check_finite": True},
        rollout={"tensor_parallel": 2},
        evaluation={
            "prompts": None,
            "every": 1,
            "benchmarks": [str(tmp_path / "eval.jsonl")],
            "samples": 2,
            "temperature": 1.0,
            "limit": 5,
        },
    )
    layout = ("student.parallel.tensor=2", "student.parallel.pipeline=2", "teacher.parallel.tensor=2")
    ended = run_job(config, 4, *layout)
    assert ended.returncode == 0, ended.output[-4000:]
    records = _check_run(tmp_path / "run", 2)
    _check_shares(records)
    evaluations = [
        record["benchmarks"]["eval"] for record in read_records(tmp_path / "run/evaluations.jsonl")
    ]
    assert [(e["problems"], e["samples"]) for e in evaluations] == [(5, 2)] * 3
    assert len({e["length_mean"] for e in evaluations}) > 1
    assert [record["evaluation/eval"] for record in records] == [e["score"] for e in evaluations[1:]]
    # The other tokens of the vocabulary hold some mass, and at most ln V nats.
    assert all(0 < record["entropy/teacher_slack"] < 10 for record in records)


def test_vanilla_distillation_in_bfloat16(tmp_path: Path) -> None:
    """The opd objective on every token, one rank, bfloat16 models and engine.

    Bfloat16 keeps 8 bits, so engine and trainer may differ by some 1e-2 nats a token; measured 0.03.
    """
    config = write_job(
        tmp_path,
        steps=2,
        objective={"name": "opd"},
        teacher={"parallel": {"tensor": 1}},
        precision={"student": "bfloat16", "teacher": "bfloat16"},
        evaluation={"prompts": None, "every": 0},
    )
    ended = run_job(config, 1)
    assert ended.returncode == 0, ended.output[-4000:]
    keys = {key for key in SEAD_KEYS if not key.startswith(("zone/", "alpha", "entropy/teacher"))}
    records = _check_run(tmp_path / "run", 2, keys=keys, logprob_diff=0.2)
    for record in records:
        assert record["tokens/active"] == record["tokens/response"]
        assert record["loss"] == pytest.approx(record["kl/reverse"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sead", "opd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_in_every_dtype_and_objective(tmp_path: Path, dtype: str, objective: str) -> None:
    """Two ranks, student TP2 with sequence parallelism, teacher PP2, engine TP2."""
    config = write_job(
        tmp_path,
        steps=2,
        objective={"name": objective},
        student={"parallel": {"tensor": 2}},
        teacher={"parallel": {"pipeline": 2}},
        precision={"student": dtype, "teacher": dtype},
        rollout={"tensor_parallel": 2},
    )
    ended = run_job(config, 2)
    assert ended.returncode == 0, ended.output[-4000:]
    keys = SEAD_KEYS if objective == "sead" else {"loss", "kl/reverse", "rollout/logprob_diff_max"}
    _check_run(tmp_path / "run", 2, keys=keys, logprob_diff=1e-3 if dtype == "float32" else 0.2)
