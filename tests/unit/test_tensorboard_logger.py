"""The TensorBoard logger: what TensorBoard itself reads from the event files."""

from pathlib import Path

import pytest

from sead_megatron.config import TrainConfig
from sead_megatron.tensorboard_logger import TensorboardLogger
from tests.tiny_inputs import minimal


def make_config(tmp_path: Path, tensorboard: bool) -> TrainConfig:
    return TrainConfig.model_validate(minimal(tmp_path) | {"metrics": {"tensorboard": tensorboard}})


def test_off_touches_nothing(tmp_path: Path) -> None:
    logger = TensorboardLogger(make_config(tmp_path, False), tmp_path, 0)
    logger.log({"step": 1})
    logger.finish()
    assert not (tmp_path / "tensorboard").exists()


def test_a_job_that_goes_on_after_step_two(tmp_path: Path) -> None:
    """Steps that are repeated after a checkpoint appear once, with the numbers of the second job."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(tmp_path, True)
    first = TensorboardLogger(config, tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.log(
            {"step": step, "loss": step / 2, "rollout/pass_rate": None}
        )  # never finished: the job is killed
    second = TensorboardLogger(config, tmp_path, 2)
    second.log({"step": 3, "loss": 0.75, "rollout/empty": 1.0})
    second.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "rollout/empty"]
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(1, 0.5), (2, 1.0), (3, 0.75)]
