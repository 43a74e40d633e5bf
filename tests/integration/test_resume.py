"""`kill -9` at any moment, then the same command: the numbers are those of a run that nobody killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.metrics import deterministic_keys
from sead_megatron.records import read_records
from tests.integration.jobs import HOOKS, Finished, run_job

CHECKPOINT = "sead_megatron.training.checkpoint"
# Where to kill: module, attribute, and which call of it (counted from the start of that process). A checkpoint is due
# after steps 2, 4 and 6 (`baseline`).
ROLLOUT = {"module": "sead_megatron.rollout.engine", "attribute": "RolloutEngine.generate"}
TEACHER = {"module": "sead_megatron.training.teacher", "attribute": "Teacher.score"}
UPDATE = {"module": "sead_megatron.training.optimizer", "attribute": "StudentOptimizer.step"}
SYNC = {"module": "sead_megatron.training.job", "attribute": "Job.sync_weights"}
COPYING = {"module": "sead_megatron.training.checkpoint_shards", "attribute": "ModelShards.share"}
WRITING = {"module": "sead_megatron.training.checkpoint_writer", "attribute": "ShareWriter.write"}
WRITING_A_TENSOR = {
    "module": "sead_megatron.training.checkpoint_writer",
    "attribute": "_CopyPlanner.resolve_data",
}
INDEXING = {"module": CHECKPOINT, "attribute": "write_index"}
COMMITTING = {"module": CHECKPOINT, "attribute": "commit_checkpoint"}
LOGGING = {"module": "sead_megatron.run_directory", "attribute": "RunDirectory.append_metrics"}


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _killed(config: Path, run: Path, fault: dict[str, Any]) -> Finished:
    ended = run_job(config, 2, f"run_dir={run}", fault=fault)
    assert ended.returncode == -9, ended.output[-3000:]
    assert ended.leftover == []
    return ended


def _check_equal(run: Path, baseline: Path) -> None:
    """Every deterministic number of every step, each step once; evaluations; sampled rollouts; checkpoints."""
    resumed, wanted = (read_records(path / "metrics.jsonl") for path in (run, baseline))
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(resumed, wanted, strict=True):
        different = {
            k: (ours.get(k), theirs.get(k)) for k in deterministic_keys() if ours.get(k) != theirs.get(k)
        }
        assert not different, (ours["step"], different)
    assert (run / "evaluations.jsonl").read_text() == (baseline / "evaluations.jsonl").read_text()
    for step in range(1, 7):
        name = f"rollouts/step_{step}.jsonl"
        assert (run / name).read_text() == (baseline / name).read_text()
    assert _checkpoints(run) == _checkpoints(baseline)


def _finish(config: Path, run: Path, baseline: Path) -> None:
    ended = run_job(config, 2, f"run_dir={run}")
    assert ended.returncode == 0, ended.output[-3000:]
    assert ended.leftover == []
    _check_equal(run, baseline)


def test_killed_while_a_checkpoint_is_written_and_in_an_update(
    baseline: tuple[Path, Path], tmp_path: Path
) -> None:
    """The two kills that lose most: every file of a checkpoint written but not committed; later, in an update.

    The first leaves nothing committed, so all is repeated; the second falls back from step 5 to the checkpoint of 2,
    while that of 4 is written.
    """
    config, wanted = baseline
    run = tmp_path / "run"
    _killed(config, run, COMMITTING | {"call": 1})
    assert _steps(run / "metrics.jsonl") in ([1, 2], [1, 2, 3])
    assert _checkpoints(run) == ["step_00000002.partial"]
    _killed(config, run, UPDATE | {"call": 5, "rank": 1})
    assert _steps(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert _checkpoints(run) == ["step_00000002", "step_00000004.partial"]
    _finish(config, run, wanted)


@pytest.mark.slow
def test_killed_once_in_every_phase(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """Kills of one run, each resumed by the next command: rollout, teacher, update, sync, while a checkpoint is
    copied, written, indexed and committed, after the commit, and around the step's record.

    The loop goes on while the writing threads are at work, so a record more or less may be there.
    """
    config, wanted = baseline
    run = tmp_path / "run"
    two, four, six = (f"step_0000000{step}" for step in (2, 4, 6))
    # Calls of generate: one for each evaluation, one for each step.
    kills: list[tuple[dict[str, Any], list[int], list[str]]] = [
        (ROLLOUT | {"call": 3}, [1], []),
        (COPYING | {"call": 1, "action": "kill after"}, [1], [f"{two}.partial"]),
        (WRITING | {"call": 1}, [1, 2], [f"{two}.partial"]),
        (WRITING_A_TENSOR | {"call": 5}, [1, 2], [f"{two}.partial"]),
        (WRITING_A_TENSOR | {"call": 5, "rank": 1}, [1, 2], [f"{two}.partial"]),
        (WRITING | {"call": 1, "action": "kill after"}, [1, 2], [f"{two}.partial"]),
        (INDEXING | {"call": 1}, [1, 2, 3], [f"{two}.partial"]),
        (COMMITTING | {"call": 1}, [1, 2, 3], [f"{two}.partial"]),
        (COMMITTING | {"call": 1, "action": "kill after"}, [1, 2, 3], [two]),
        (TEACHER | {"call": 2, "rank": 1}, [1, 2, 3], [two]),
        (SYNC | {"call": 2}, [1, 2], [two]),
        (LOGGING | {"call": 2}, [1, 2, 3], [two, f"{four}.partial"]),
        (LOGGING | {"call": 2, "action": "kill after"}, [1, 2, 3, 4], [two, f"{four}.partial"]),
        (UPDATE | {"call": 3, "rank": 1}, [1, 2, 3, 4], [two, f"{four}.partial"]),
        (COMMITTING | {"call": 1, "action": "kill after"}, [1, 2, 3, 4, 5], [two, four]),
        # The last record is there before the last commit, and no step runs beside it.
        (COMMITTING | {"call": 1}, [1, 2, 3, 4, 5, 6], [two, four, f"{six}.partial"]),
    ]
    beside = {"ShareWriter.write", "_CopyPlanner.resolve_data", "write_index", "commit_checkpoint"}
    for number, (fault, steps, checkpoints) in enumerate(kills):
        _killed(config, run, fault)
        found = _steps(run / "metrics.jsonl")
        in_loop = fault["attribute"] not in beside or number == len(kills) - 1
        assert found == steps or (not in_loop and found == steps[:-1]), (fault, found)
        # A rank may be killed before its writing thread has made the directory.
        assert _checkpoints(run) in (checkpoints, [c for c in checkpoints if ".partial" not in c]), fault
    _finish(config, run, wanted)


def test_a_failed_write_ends_the_job(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """The writing thread of rank 1 fails: traceback, exit code, nobody left; the same command then continues."""
    config, wanted = baseline
    run = tmp_path / "run"
    ended = run_job(config, 2, f"run_dir={run}", fault=WRITING | {"rank": 1, "call": 2, "action": "raise"})
    assert ended.returncode not in (0, -9), ended.output[-3000:]
    failed_at = re.search(r"RuntimeError: injected failure at ([\d.]+)", ended.output)
    assert failed_at, ended.output[-3000:]
    assert "in poll" in ended.output
    assert ended.leftover == []
    assert ended.ended_at - float(failed_at[1]) < 60
    assert _steps(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert "step_00000002" in _checkpoints(run) and "step_00000004" not in _checkpoints(run)
    _finish(config, run, wanted)


def test_a_kill_stays_within_its_job() -> None:
    """A rank that outlived its launcher has a parent that is not of the job: it ends itself and nobody else.

    Here that parent is the test process, which would not see the end of this line.
    """
    environment = os.environ | {"SEAD_TEST_JOB": "another", "PYTHONPATH": str(HOOKS)}
    command = [sys.executable, "-c", "import sitecustomize; sitecustomize.kill_job()"]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL


def test_resuming_needs_the_whole_state(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """Negative control without a job: the comparison sees a single changed number and a repeated step."""
    _, wanted = baseline
    run = tmp_path / "run"
    shutil.copytree(wanted, run)
    _check_equal(run, wanted)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[4]["loss"] *= 1 + 1e-12
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(AssertionError, match="loss"):
        _check_equal(run, wanted)
    shutil.copy(wanted / "metrics.jsonl", run / "metrics.jsonl")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(records[3]) + "\n")
    with pytest.raises(AssertionError):
        _check_equal(run, wanted)


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """The same command once more adds no step, writes no checkpoint and succeeds."""
    config, wanted = baseline
    run = tmp_path / "run"
    shutil.copytree(wanted, run)
    names = ("metrics.jsonl", "evaluations.jsonl")
    before = [(run / name).read_bytes() for name in names]
    written = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    _finish(config, run, wanted)
    assert [(run / name).read_bytes() for name in names] == before
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == written


def test_an_exception_on_one_rank_ends_the_job(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """Rank 1 fails in its third update while rank 0 waits in a collective: traceback, exit code, nobody left.

    Meanwhile a checkpoint is being written.
    """
    config, _ = baseline
    fault = UPDATE | {"rank": 1, "call": 3, "action": "raise"}
    ended = run_job(config, 2, f"run_dir={tmp_path / 'run'}", fault=fault)
    assert ended.returncode not in (0, -9), ended.output[-3000:]
    failed_at = re.search(r"RuntimeError: injected failure at ([\d.]+)", ended.output)
    assert failed_at, ended.output[-3000:]
    assert "in train_step" in ended.output
    assert ended.leftover == []
    assert _steps(tmp_path / "run" / "metrics.jsonl") == [1, 2]
    # A hang would last until the collectives' time limit, an hour.
    assert ended.ended_at - float(failed_at[1]) < 60
