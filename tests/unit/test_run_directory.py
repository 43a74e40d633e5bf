"""RUN_DIR: which configuration it holds, and what a resume keeps."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sead_megatron.config import TrainConfig, load_config
from sead_megatron.errors import UserError
from sead_megatron.run_directory import RunDirectory
from tests.tiny_inputs import minimal


def make_config(tmp_path: Path, *overrides: str) -> TrainConfig:
    path = tmp_path / "input.yaml"
    path.write_text(yaml.safe_dump(minimal(tmp_path)))
    return load_config(path, overrides)


def test_open_writes_the_resolved_config(tmp_path: Path) -> None:
    config = make_config(tmp_path, "optimizer.lr=1e-6")
    run = RunDirectory.open(config)
    assert load_config(run.path / "config.yaml") == config
    assert run.rollouts_path.is_dir() and run.checkpoints_path == tmp_path / "run" / "checkpoints"
    assert RunDirectory.open(config) == run


def test_open_names_every_difference(tmp_path: Path) -> None:
    RunDirectory.open(make_config(tmp_path))
    changed = make_config(tmp_path, "steps=5", "optimizer.lr=2e-6", "objective={name: opd}")
    with pytest.raises(UserError) as caught:
        RunDirectory.open(changed)
    text = str(caught.value)
    assert text == (
        f'run_dir = "{tmp_path}/run": holds a run with another configuration: '
        'objective.name "sead" -> "opd", '
        "optimizer.lr 1e-06 -> 2e-06, steps 4 -> 5; choose another run_dir, or restore these fields"
    )
    assert load_config(tmp_path / "run" / "config.yaml").steps == 4


@pytest.mark.parametrize(
    "override",
    [
        "student.parallel.tensor=2",
        "teacher.parallel.pipeline=2",
        "student.recompute=full",
        "teacher.offload_hidden=true",
        "rollout.tensor_parallel=2",
        "rollout.gpu_memory_utilization=0.7",
        "rollout.kv_cache_gib=0.2",
        "rollout.sync_bucket_mib=64",
        "batch.max_tokens_per_microbatch=128",
        "checkpoint.every=1",
        "metrics.wandb=offline",
        "kernel.tile_tokens=64",
        "evaluation.every=2",
    ],
)
def test_layout_and_reporting_may_change(tmp_path: Path, override: str) -> None:
    RunDirectory.open(make_config(tmp_path))
    changed = make_config(tmp_path, override)
    run = RunDirectory.open(changed)
    assert load_config(run.config_path) == changed


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "precision.student=float32",
        "rollout.temperature=1.0",
        "optimizer.beta1=0.8",
        "optimizer.distributed=false",
        "curriculum.sigma=0.1",
    ],
)
def test_what_changes_results_may_not(tmp_path: Path, override: str) -> None:
    RunDirectory.open(make_config(tmp_path))
    with pytest.raises(UserError, match=override.partition("=")[0]):
        RunDirectory.open(make_config(tmp_path, override))


def test_a_field_younger_than_the_stored_config_had_its_default(tmp_path: Path) -> None:
    stored = RunDirectory.open(make_config(tmp_path)).config_path
    old = yaml.safe_load(stored.read_text())
    del old["optimizer"]["beta2"], old["curriculum"]["sigma"], old["objective"]["zone_a_score"], old["seed"]
    stored.write_text(yaml.safe_dump(old))
    RunDirectory.check(make_config(tmp_path))
    with pytest.raises(UserError, match=r"configuration: optimizer\.beta2 \(not set\) -> 0\.9; choose"):
        RunDirectory.check(make_config(tmp_path, "optimizer.beta2=0.9"))
    stored.write_text("")
    with pytest.raises(
        UserError, match=r"run/config\.yaml: must hold keys and values; choose another run_dir"
    ):
        RunDirectory.check(make_config(tmp_path))


def test_check_writes_nothing(tmp_path: Path) -> None:
    RunDirectory.check(make_config(tmp_path))
    assert not (tmp_path / "run").exists()
    RunDirectory.open(make_config(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    RunDirectory.check(make_config(tmp_path, "checkpoint.every=1"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_refuses_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    # Permissions do not bind root, who may run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError) as caught:
        RunDirectory.check(config)
    assert str(caught.value) == f'run_dir = "{tmp_path}/run": {tmp_path} cannot be written; choose another'


def test_one_job_at_a_time(tmp_path: Path) -> None:
    """The holder also forks: what the child inherits must not keep the lock after a kill of the holder."""
    config = make_config(tmp_path)
    holder_code = (
        "import os, sys, time\n"
        "from sead_megatron.config import load_config\n"
        "from sead_megatron.run_directory import RunDirectory\n"
        "RunDirectory.open(load_config(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", holder_code, str(tmp_path / "input.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            for refuse in (RunDirectory.check, RunDirectory.open):
                with pytest.raises(UserError) as caught:
                    refuse(config)
                assert str(caught.value) == (
                    f'run_dir = "{tmp_path}/run": another job is running in it; wait for its end, '
                    "or choose another"
                )
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # still there
            RunDirectory.check(config)
            RunDirectory.open(config)
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert RunDirectory.open(make_config(tmp_path)).config_path.is_file()


def test_a_moved_run_goes_on(tmp_path: Path) -> None:
    RunDirectory.open(make_config(tmp_path))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = f"run_dir={tmp_path / 'moved'}"
    assert load_config(RunDirectory.open(make_config(tmp_path, moved)).config_path).run_dir == str(
        tmp_path / "moved"
    )


def test_refuses_what_is_not_a_run(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(
        UserError, match=r"holds metrics\.jsonl but no config\.yaml; choose another directory"
    ):
        RunDirectory.open(config)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError) as caught:
        RunDirectory.open(config)
    assert str(caught.value) == (
        f'run_dir = "{tmp_path}/run": {tmp_path}/run is not a directory; choose another'
    )


def test_rewind_forgets_later_steps_everywhere(tmp_path: Path) -> None:
    run = RunDirectory.open(make_config(tmp_path))
    run.append_evaluation({"step": 0, "accuracy": 0.25})
    for step in range(1, 12):
        run.append_metrics({"step": step, "loss": 1.0 / step})
        run.write_rollouts(step, [{"text": "ä", "kl": [0.5]}])
    run.append_evaluation({"step": 11, "accuracy": 0.5})
    (run.rollouts_path / ".step_12.jsonl.tmp").write_text("half")  # a kill while writing
    assert run.evaluated_steps() == {0, 11}
    run.rewind(9)
    assert run.metrics_path.read_text().splitlines()[-1] == '{"step": 9, "loss": 0.1111111111111111}'
    assert run.evaluated_steps() == {0}
    assert sorted(path.name for path in run.rollouts_path.iterdir()) == sorted(
        f"step_{n}.jsonl" for n in range(1, 10)
    )
    assert (run.rollouts_path / "step_1.jsonl").read_text() == '{"text": "\\u00e4", "kl": [0.5]}\n'
    run.rewind(0)
    assert run.metrics_path.read_text() == "" and not list(run.rollouts_path.iterdir())
    assert run.evaluated_steps() == {0}


def test_rewind_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    run = RunDirectory.open(make_config(tmp_path))
    run.rewind(0)
    assert not run.metrics_path.exists() and run.evaluated_steps() == set()
