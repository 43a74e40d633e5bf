"""A file that another node has written may be there later than its name is known."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sead_megatron.errors import UserError
from sead_megatron.training.checkpoint_files import check_checkpoint, checkpoint_path, wait_for_file
from tests.tiny_run import write_checkpoint_files


def appear(file: Path, hidden: Path, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, hidden.rename, [file])
    timer.start()
    return timer


def test_a_late_file_is_waited_for(tmp_path: Path) -> None:
    """Every file of a checkpoint in turn: hidden, it is waited for; without patience it is missing."""
    path = checkpoint_path(tmp_path, 2)
    write_checkpoint_files(path, 2)
    names = sorted(os.listdir(path))
    assert names == [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "rng_0.pt", "state.json"]
    for name in names:
        hidden = (path / name).rename(tmp_path / "hidden")
        with pytest.raises(
            UserError, match=f"{name}: missing; remove this checkpoint directory to start over"
        ):
            check_checkpoint(path)
        timer = appear(path / name, hidden, 0.2)
        check_checkpoint(path, late_seconds=30.0)
        timer.join()


def test_a_file_that_grows_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "step_00000002" / "__1_0.distcp"
    file.parent.mkdir()
    file.write_bytes(b"12")
    timer = threading.Timer(0.2, file.write_bytes, [b"1234"])
    timer.start()
    wait_for_file(file, 4, 30.0)
    timer.join()
    assert file.stat().st_size == 4


def test_a_file_that_never_comes(tmp_path: Path) -> None:
    """The message names the file and the time."""
    file = tmp_path / "step_00000002" / "__1_0.distcp"
    file.parent.mkdir()
    with pytest.raises(UserError, match=r"step_00000002/__1_0\.distcp: missing after 0\.3 s; remove this"):
        wait_for_file(file, 4, 0.3)
    file.write_bytes(b"12")
    with pytest.raises(UserError, match=r"2 bytes, must have 4 by \.metadata after 0\.3 s"):
        wait_for_file(file, 4, 0.3)
