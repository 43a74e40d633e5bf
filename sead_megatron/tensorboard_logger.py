"""TensorBoard, when `metrics.tensorboard` asks for it: event files in RUN_DIR/tensorboard. The package is imported
only then."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sead_megatron.config.schema import TrainConfig


class TensorboardLogger:
    """Writes step records to event files; does nothing when `metrics.tensorboard` is off. For rank 0."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        """Start, or continue after `step` steps: what earlier files say of later ones is hidden by TensorBoard."""
        self._writer: Any = None
        if config.metrics.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write every number of a step's record, at its key `step`."""
        if self._writer is None:
            return
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])
        # A killed job must not take along steps whose checkpoint is there: they are not repeated.
        self._writer.flush()

    def finish(self) -> None:
        """Flush and close the files."""
        if self._writer is not None:
            self._writer.close()
