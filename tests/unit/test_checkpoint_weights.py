"""What an engine is given of a checkpoint, bit by bit against its safetensors files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sead_megatron.errors import UserError
from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
from tests.conversions import run, tensors


def check_equal(weights: CheckpointWeights, directory: Path, *, tied: bool = False) -> None:
    """Names, order and bits; every tensor in storage of its own, also while all are kept."""
    streamed = list(weights)
    stored = tensors(directory)
    assert len(streamed) == len(weights.names) and {name for name, _ in streamed} == weights.names
    assert weights.names == stored.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in streamed:
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in streamed}) == len(streamed)
    assert [name for name, _ in weights] == [name for name, _ in streamed]


@pytest.mark.parametrize("family", ["llama", "nemotron_nas", "olmo3", "qwen3", "tied"])
def test_hugging_face_and_converted(families: dict[str, Path], tmp_path: Path, family: str) -> None:
    tied = family == "tied"
    check_equal(CheckpointWeights(families[family]), families[family], tied=tied)
    run(families[family], tmp_path / "converted")
    check_equal(CheckpointWeights(tmp_path / "converted"), families[family], tied=tied)


def test_a_checkpoint_without_config(converted: Path, llama: Path) -> None:
    """As a run writes it: config.json is the model's."""
    (converted / "config.json").unlink()
    (converted / "conversion.json").unlink()
    check_equal(CheckpointWeights(converted, llama), llama)


def test_refusals(llama: Path, converted: Path, tmp_path: Path) -> None:
    def mistake(directory: Path) -> str:
        with pytest.raises(UserError) as caught:
            CheckpointWeights(directory)
        return str(caught.value).replace(str(tmp_path), "DIR")

    shutil.copytree(converted, tmp_path / "unmarked")
    (tmp_path / "unmarked/conversion.json").unlink()
    assert mistake(tmp_path / "unmarked") == (
        "DIR/unmarked: is a distributed checkpoint without conversion.json, so not whole; convert the model again"
    )
    stored = llama / "model.safetensors"
    size = stored.stat().st_size
    stored.write_bytes(stored.read_bytes()[:-4])
    assert f"but the file has {size - 4}; complete the download" in mistake(llama)
