"""The W&B logger against a stand-in module: what it is asked for, and that a resume continues the run."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sead_megatron.config import TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.wandb_logger import WandbLogger
from tests.tiny_inputs import minimal


def make_config(tmp_path: Path, **metrics: str) -> TrainConfig:
    return TrainConfig.model_validate(minimal(tmp_path) | {"metrics": metrics})


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, record: dict[str, Any]) -> None:
        self.calls.append(("log", record))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeRun, dict[str, Any]]]:
    runs: list[tuple[FakeRun, dict[str, Any]]] = []
    module = ModuleType("wandb")

    def init(**arguments: Any) -> FakeRun:
        runs.append((FakeRun(), arguments))
        return runs[-1][0]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_off_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    logger = WandbLogger(make_config(tmp_path), tmp_path)
    logger.log({"step": 1})
    logger.finish()
    assert not (tmp_path / "wandb_run_id").exists()


def test_resumes_the_same_run(tmp_path: Path, started: list[tuple[FakeRun, dict[str, Any]]]) -> None:
    config = make_config(tmp_path, wandb="offline", wandb_project="sead")
    logger = WandbLogger(config, tmp_path)
    logger.log({"step": 1, "loss": 0.5})
    logger.finish()
    WandbLogger(config, tmp_path)
    (run, first), (_, second) = started
    assert run.calls == [
        ("define_metric", ("*", "step")),
        ("log", {"step": 1, "loss": 0.5}),
        ("finish", None),
    ]
    assert (
        first["id"] == second["id"] == (tmp_path / "wandb_run_id").read_text().strip()
        and len(first["id"]) == 8
    )
    assert (first["mode"], first["resume"], first["project"]) == ("offline", "allow", "sead")
    assert first["config"]["optimizer"]["lr"] == 1e-6 and first["dir"] == str(tmp_path)


def test_missing_package_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as caught:
        WandbLogger(make_config(tmp_path, wandb="online"), tmp_path)
    assert str(caught.value) == (
        'metrics.wandb = "online": needs the package wandb; pip install wandb, or set it to off'
    )
