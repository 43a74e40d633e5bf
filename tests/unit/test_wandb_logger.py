"""The W&B logger: what it asks of the package (a stand-in), and the files of the real one in offline mode."""

import json
import os
import subprocess
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


_OFFLINE = """
import json, sys
from pathlib import Path
from sead_megatron.config import TrainConfig
from sead_megatron.wandb_logger import WandbLogger

if __name__ == "__main__":
    raw, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    logger = WandbLogger(TrainConfig.model_validate(raw), directory)
    logger.log({"step": 1, "loss": 0.515625, "evaluation/accuracy": None})
    logger.finish()
"""


def test_the_real_package_offline(tmp_path: Path) -> None:
    """Two jobs of one run, without a network; what W&B would upload holds the records of both."""
    raw = minimal(tmp_path) | {"metrics": {"wandb": "offline"}}
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", _OFFLINE, json.dumps(raw), str(tmp_path)],
            env=os.environ | {"WANDB_SILENT": "true"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    assert all(b"0.515625" in file.read_bytes() for file in files)
