"""Weights & Biases, when `metrics.wandb` asks for it. The package is imported only then; offline mode needs
no network.

An offline run is uploaded later with `wandb sync RUN_DIR/wandb/offline-run-*`. A resumed job continues the
same W&B run: its id is kept in RUN_DIR/wandb_run_id.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sead_megatron.config.schema import TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.records import write_atomically


class WandbLogger:
    """Logs step records to one W&B run; does nothing when `metrics.wandb` is off. For rank 0."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        """Start or continue the run. Raises UserError when wandb is asked for and not installed."""
        self._run: Any = None
        if config.metrics.wandb == "off":
            return
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise UserError(
                "metrics.wandb",
                config.metrics.wandb,
                "needs the package wandb",
                "pip install wandb, or set it to off",
            ) from error
        self._run = wandb.init(
            project=config.metrics.wandb_project,
            id=_run_id(run_dir / "wandb_run_id"),
            name=run_dir.name,
            resume="allow",
            mode=config.metrics.wandb,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        # Not W&B's own step: it only grows, and a job that resumes from a checkpoint repeats the steps after
        # it.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the record of a step or of an evaluation; its key `step` is the horizontal axis."""
        if self._run is not None:
            self._run.log(dict(record))

    def finish(self) -> None:
        """Flush and close the run."""
        if self._run is not None:
            self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
