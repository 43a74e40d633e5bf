"""The final table, from files alone."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from sead_megatron.config import TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.run_directory import RunDirectory
from sead_megatron.summary import summary_rows, summary_table
from tests.tiny_inputs import minimal


def finished_run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.open(TrainConfig.model_validate(minimal(tmp_path)))
    run.append_evaluation(
        {"step": 0, "accuracy": 0.25, "correct": 4, "total": 16, "truncated": 3, "length_mean": 40.5}
    )
    for step, (b_share, diff) in enumerate([(0.4, 1e-6), (0.2, 3e-5)], start=1):
        run.append_metrics(
            {
                "step": step,
                "loss": 1.0 / step,
                "zone/a_share": 0.5,
                "zone/b_share": b_share,
                "zone/c_share": 0.5 - b_share,
                "rollout/logprob_diff_max": diff,
                "time/rollout": 6.0,
                "time/update": 2.0 * step,
                "time/other": 0.5,
                "time/step": 6.5 + 2.0 * step,
            }
        )
    run.append_evaluation(
        {"step": 2, "accuracy": 0.5, "correct": 8, "total": 16, "truncated": 0, "length_mean": 30.0}
    )
    return run


def test_rows(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    assert summary_rows(run.path) == [
        ("student", str(tmp_path / "student")),
        ("teacher", str(tmp_path / "teacher")),
        ("objective", "sead"),
        ("steps", "2 of 4"),
        ("held-out greedy accuracy, before", "25.0% (4 of 16), 3 truncated"),
        ("held-out greedy accuracy, step 2", "50.0% (8 of 16)"),
        ("loss, first -> last step", "1.0000 -> 0.5000 nats"),
        ("zones A / B / C, share of tokens", "50.0% / 30.0% / 20.0%"),
        ("engine - trainer logprob, max", "3.00e-05 nats"),
        ("time, rollout", "12.0 s (63.2%)"),
        ("time, update", "6.0 s (31.6%)"),
        ("time, other", "1.0 s (5.3%)"),
        ("run directory", str(run.path)),
    ]


def test_shares_of_the_forward_kl_where_measured(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    shares = {"zone/a_fkl_share": 0.1, "zone/b_fkl_share": 0.6, "zone/c_fkl_share": 0.3}
    run.append_metrics({"step": 3, "loss": 0.1, "skipped_steps": 1, **shares})
    rows = dict(summary_rows(run.path))
    assert rows["zones A / B / C, share of forward KL"] == "10.0% / 60.0% / 30.0%"
    assert rows["zones A / B / C, share of tokens"] == "50.0% / 30.0% / 20.0%"
    assert rows["skipped steps"] == "1"


def test_benchmarks_beside_or_without_prompts(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    for step, score in ((0, 0.5), (4, 0.625)):
        run.append_evaluation({"step": step, "benchmarks": {"AMC23": {"score": score}}})
    rows = dict(summary_rows(run.path))
    assert rows["AMC23, step 0 -> 4"] == "50.0% -> 62.5%"
    assert rows["held-out greedy accuracy, step 2"] == "50.0% (8 of 16)"


def test_table_prints_the_rows(tmp_path: Path) -> None:
    out = io.StringIO()
    Console(file=out, width=300, color_system=None).print(summary_table(finished_run(tmp_path).path))
    assert "held-out greedy accuracy, step 2 │ 50.0% (8 of 16)" in " ".join(out.getvalue().split())


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        summary_rows(tmp_path)
    run = RunDirectory.open(TrainConfig.model_validate(minimal(tmp_path)))
    with pytest.raises(UserError, match="holds no finished step"):
        summary_rows(run.path)
