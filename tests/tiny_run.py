"""What a run leaves behind when its processes are gone, without a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint

from sead_megatron.config import TrainConfig, dump_config
from sead_megatron.run_directory import RunDirectory
from sead_megatron.training.checkpoint_files import FORMAT, checkpoint_path


def write_checkpoint_files(path: Path, step: int) -> None:
    """What one rank writes: two tensors in torch's distributed format, Megatron's two files, and ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is distributed here
        distributed_checkpoint.save(
            {"weight": torch.arange(12.0).reshape(3, 4), "master": torch.ones(5)},
            checkpoint_id=path,
            no_dist=True,
        )
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({}, path / "common.pt")
    torch.save({"torch": torch.get_rng_state()}, path / "rng_0.pt")
    counters = {"step": step, "weight_version": step, "skipped_steps": 0, "skipped_in_a_row": 0}
    counters |= {"format": FORMAT, "world_size": 1, "optimizer_updates": step}
    (path / "state.json").write_text(
        json.dumps(counters | {"schedule": {}, "curriculum": {}, "objective": {}})
    )


def write_run(config: TrainConfig, *steps: int) -> RunDirectory:
    """A run directory with checkpoints after `steps`; nobody holds its lock."""
    run = RunDirectory(Path(config.run_dir))
    run.path.mkdir()
    run.config_path.write_text(dump_config(config))
    run.lock_path.touch()
    for step in steps:
        write_checkpoint_files(checkpoint_path(run.checkpoints_path, step), step)
    return run
