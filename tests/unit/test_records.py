"""JSONL files that survive a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sead_megatron.errors import UserError
from sead_megatron.records import append_record, read_records, truncate_records, write_atomically


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(
        path, {"step": 1, "loss": 0.5, "zone/empty": np.int64(2), "lr": np.float32(0.25), "ok": True}
    )
    append_record(path, {"step": 2, "loss": 0.25})
    assert path.read_text() == (
        '{"step": 1, "loss": 0.5, "zone/empty": 2, "lr": 0.25, "ok": true}\n{"step": 2, "loss": 0.25}\n'
    )
    assert read_records(path)[1] == {"step": 2, "loss": 0.25}
    assert read_records(tmp_path / "none.jsonl") == []


def test_nonfinite_numbers_stay_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(
        path,
        {
            "step": 1,
            "loss": math.nan,
            "grad_norm": math.inf,
            "lr": -math.inf,
            "kls": [0.5, math.nan],
            "none": None,
        },
    )

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "loss_nonfinite": "nan",
        "grad_norm": None,
        "grad_norm_nonfinite": "inf",
        "lr": None,
        "lr_nonfinite": "-inf",
        "kls": [0.5, None],
        "none": None,
    }
    (record,) = read_records(path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["lr"] == -math.inf
    assert record["none"] is None and "loss_nonfinite" not in record
    before = path.read_text()
    truncate_records(path, 1)
    assert path.read_text() == before


def test_append_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl needs an integer step, got None"):
        append_record(tmp_path / "metrics.jsonl", {"loss": 1.0})


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", [1, 2]),
        (b'{"step": 3, "loss": 0.1}', [1, 2, 3]),  # whole, the newline is missing
        (b'{"step": 3, "lo', [1, 2]),
        (b'{"step": 3, "loss": 0.1', [1, 2]),
        (b"\xff\xfe", [1, 2]),
    ],
)
def test_truncate_repairs_the_last_line(tmp_path: Path, tail: bytes, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    truncate_records(path, 10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
    append_record(path, {"step": 4})
    assert [record["step"] for record in read_records(path)] == [*kept, 4]


def test_truncate_forgets_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_record(path, {"step": step})
    truncate_records(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    truncate_records(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_damage_before_the_last_line_is_not_guessed_at(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 = .*is not a record with a step"):
        truncate_records(path, 3)


def test_sigkill_while_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # 1 MiB a record: many pages a write, so that the kill has something to cut.
    code = (
        "import sys; from pathlib import Path; from sead_megatron.records import append_record\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    append_record(Path(sys.argv[1]), {'step': step, 'padding': 'x' * 2**20})\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 30
        while not (path.exists() and path.stat().st_size > 2 * 2**20) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        whole = path.read_bytes().count(b"\n")
        assert whole >= 1
        truncate_records(path, 10**9)
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= whole
        path.unlink()


def test_write_atomically_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
