"""RUN_DIR: the files a run leaves behind, written so that a kill at any moment loses at most the current
step.

    .lock                 held by rank 0 while a job runs
    config.yaml           resolved configuration
    metrics.jsonl         one object a step, keys of `sead_megatron.metrics`
    evaluations.jsonl     one object per held-out evaluation: step; accuracy, correct, total, truncated, length_mean of
                          evaluation.prompts; benchmarks: name -> problems, samples, correct, score, truncated, ...
    rollouts/step_N.jsonl sampled rollouts of step N
    checkpoints/          written by the checkpoint code

Only rank 0 writes. `open` first, then, always (a run may die before its first checkpoint), `rewind(step)`
with the step of the checkpoint that training continues from, 0 without one.
"""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_megatron.config import TrainConfig, dump_config
from sead_megatron.config.yaml_file import read_yaml
from sead_megatron.errors import UserError
from sead_megatron.records import (
    append_record,
    read_records,
    truncate_records,
    write_atomically,
    write_records,
)

# Fields (or sections, ending in ".") that change how or how fast a run computes, never what: they may change
# on resume.
_MAY_CHANGE = (
    "run_dir",
    "student.parallel.",
    "student.recompute",
    "teacher.parallel.",
    "teacher.offload_hidden",
    "reference.parallel.",
    "rollout.tensor_parallel",
    "rollout.gpu_memory_utilization",
    "rollout.async_scheduling",
    "rollout.kv_cache_gib",
    "rollout.sync_bucket_mib",
    "batch.",
    "checkpoint.",
    "metrics.",
    "kernel.",
    "evaluation.",
    "profile.",
)
_MISSING = "(not set)"
_ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class RunDirectory:
    """Paths and writers of one run. `open` creates and checks the directory."""

    path: Path

    @classmethod
    def open(cls, config: TrainConfig) -> "RunDirectory":
        """Create RUN_DIR, or take up the one that this configuration (or one with equal results) wrote;
        write config.yaml. The directory belongs to this process until it dies.

        Raises UserError as `check` does.
        """
        run = cls.check(config)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            # Never closed: closing gives the lock away.
            _lock(os.open(run.lock_path, os.O_RDWR | os.O_CREAT, 0o666), run.path)
            write_atomically(run.config_path, dump_config(config))
            run.rollouts_path.mkdir(exist_ok=True)
            run.checkpoints_path.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(run.path, error) from error
        return run

    @classmethod
    def check(cls, config: TrainConfig) -> "RunDirectory":
        """`open` without writing anything.

        Raises UserError when RUN_DIR holds another configuration (each differing field is named), files of a
        run without a configuration, or a job that is still running, or when it cannot be written.
        """
        run = cls(Path(config.run_dir))
        _check_writable(run.path)
        if run.config_path.exists():
            _check_same_run(run.config_path, config)
        elif left := [
            path.name for path in (run.metrics_path, run.rollouts_path, run.checkpoints_path) if path.exists()
        ]:
            raise UserError(
                "run_dir",
                config.run_dir,
                f"holds {', '.join(left)} but no config.yaml",
                "choose another directory",
            )
        if run.lock_path.exists():
            _try_lock(run.lock_path, run.path)
        return run

    @property
    def lock_path(self) -> Path:
        return self.path / ".lock"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_path(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def rollouts_path(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add the record of a step (it has an integer `step`); on disk when this returns."""
        append_record(self.metrics_path, record)

    def append_evaluation(self, record: Mapping[str, Any]) -> None:
        """Add an evaluation (it has an integer `step`, 0 before the first); on disk when this returns."""
        append_record(self.evaluations_path, record)

    def write_rollouts(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write `rollouts/step_N.jsonl`, complete or not at all."""
        write_records(self.rollouts_path / f"step_{step}.jsonl", records)

    def evaluated_steps(self) -> set[int]:
        """Steps whose evaluation is on disk: after a resume they need none."""
        return {int(record["step"]) for record in read_records(self.evaluations_path)}

    def rewind(self, after_step: int) -> None:
        """Forget everything later than `after_step`: metrics, evaluations, rollouts."""
        self.truncate_metrics(after_step)
        truncate_records(self.evaluations_path, after_step)
        for path in list(self.rollouts_path.iterdir()) if self.rollouts_path.is_dir() else []:
            match = _ROLLOUT_FILE.fullmatch(path.name)
            if path.name.endswith(".tmp") or (match and int(match[1]) > after_step):
                path.unlink()

    def truncate_metrics(self, after_step: int) -> None:
        """Keep the records of steps <= `after_step`, rewriting the file atomically.

        A last line that a kill left half-written is dropped. Raises UserError for any other line that is no
        record.
        """
        truncate_records(self.metrics_path, after_step)


def _check_writable(path: Path) -> None:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError("run_dir", str(path), f"{nearest} is not a directory", "choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError("run_dir", str(path), f"{nearest} cannot be written", "choose another")


def _not_writable(run_dir: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError("run_dir", str(run_dir), f"cannot be written ({reason})", "choose another")


def _try_lock(lock_path: Path, run_dir: Path) -> None:
    """Take the lock and give it back."""
    try:
        descriptor = os.open(lock_path, os.O_RDWR)
    except OSError as error:
        raise _not_writable(run_dir, error) from error
    try:
        _lock(descriptor, run_dir)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    """Refuse a second job in one run directory. The kernel releases the lock when the process dies.

    A record lock, not flock: that one would live on in every process that this one forks.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Anything else: a file system without locks. The run is no worse off than before there were any.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                "run_dir", str(run_dir), "another job is running in it", "wait for its end, or choose another"
            ) from error


def _check_same_run(stored: Path, config: TrainConfig) -> None:
    content = read_yaml(stored)
    if not isinstance(content, dict):
        raise UserError(str(stored), None, "must hold keys and values", "choose another run_dir")
    old = _flatten(content)
    new = _flatten(config.model_dump(mode="json"))
    # A field that is younger than the stored file: the run was made with what is now its default.
    chosen = _flatten(config.model_dump(mode="json", exclude_defaults=True))
    old = {key: value for key, value in new.items() if key not in chosen} | old
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _MISSING) != new.get(key, _MISSING) and not _may_change(key)
    ]
    # Another objective or curriculum has other fields; its name says it all.
    variants = [key.removesuffix("name") for key in differing if key.endswith(".name")]
    changes = [
        f"{key} {_shown(old, key)} -> {_shown(new, key)}"
        for key in differing
        if key.endswith(".name") or not key.startswith(tuple(variants))
    ]
    if changes:
        raise UserError(
            "run_dir",
            config.run_dir,
            f"holds a run with another configuration: {', '.join(changes)}",
            "choose another run_dir, or restore these fields",
        )


def _may_change(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in _MAY_CHANGE)


def _shown(fields: dict[str, Any], key: str) -> str:
    return json.dumps(fields[key]) if key in fields else _MISSING


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {
        key: value
        for name, inner in tree.items()
        for key, value in _flatten(inner, f"{prefix}{name}.").items()
    }
