"""A difficulty file that is written in batches, killed and taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.config import load_config
from sead_megatron.data.prompts import read_prompts
from sead_megatron.errors import UserError
from sead_megatron.evaluation.difficulty_file import DifficultyFile, describe
from tests.tiny_inputs import write_inputs

IDS = [f"p{i}" for i in range(10)]
ENTRIES = [(name, i / 8) for i, name in enumerate(IDS[:8])] + [("p8", 0.5), ("p9", 1.0)]


def started(path: Path, **provenance: Any) -> DifficultyFile:
    return DifficultyFile(path, {"seed": 1, "samples": 8} | provenance, IDS)


def test_batches(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    file = started(path)
    assert (file.check(), path.exists()) == (0, False)
    assert file.take_up(4) == 0
    file.append(ENTRIES[:4])
    file.append(ENTRIES[4:7])
    whole = path.read_bytes()
    assert file.check() == 7
    path.write_bytes(whole[:-1])  # the kill came within the line of p6
    assert (file.check(), path.read_bytes()) == (6, whole[:-1])
    assert started(path).take_up(4) == 4
    file.append(ENTRIES[4:8])
    file.append(ENTRIES[8:])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"provenance": {"seed": 1, "samples": 8}},
        *({"id": name, "difficulty": value} for name, value in ENTRIES),
    ]
    # The last batch is smaller, and whole.
    before = path.read_bytes()
    assert (started(path).take_up(4), path.read_bytes()) == (10, before)


def test_an_empty_file_is_started(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.touch()
    assert started(path).check() == 0
    assert started(path).take_up(4) == 0
    assert path.read_text() == '{"provenance": {"seed": 1, "samples": 8}}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "p0"}\n', "FILE, line 1: is not the first line of an estimate; choose another OUT"),
        ("notes without an end", "FILE, line 1: is not the first line of an estimate; choose another OUT"),
        ("steps: 3\n", "FILE, line 1: is not the first line of an estimate; choose another OUT"),
        (
            '{"provenance": {"seed": 2, "samples": 8, "old": 1}}\n',
            "FILE, line 1: belongs to another estimate: old, seed differ; "
            "choose another OUT, or remove it to estimate again",
        ),
        (
            '{"provenance": {"seed": 1, "samples": 8}}\n{"id": "p1", "difficulty": 0}\n',
            "FILE, line 2: is not the next prompt's difficulty; choose another OUT, or remove it",
        ),
        (
            '{"provenance": {"seed": 1, "samples": 8}}\n{"id": "p0", "diffi\n',
            "FILE, line 2: is not the next prompt's difficulty; choose another OUT, or remove it",
        ),
    ],
)
def test_files_that_are_not_continued(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    for call in (started(path).check, lambda: started(path).take_up(4)):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).replace(str(path), "FILE") == message
        assert path.read_text() == content


def test_what_decides_the_pass_rates_is_in_the_provenance(tmp_path: Path) -> None:
    path = write_inputs(tmp_path)
    prompts = read_prompts(tmp_path / "prompts.jsonl")

    def told(*overrides: str, samples: int = 8) -> dict[str, Any]:
        return describe(load_config(path, overrides), prompts, samples)

    first = told()
    assert told("steps=9", "teacher.parallel.tensor=2", "rollout.tensor_parallel=2") == first
    for change in ("seed=3", "rollout.temperature=1.0", "rollout.top_p=0.9", "rollout.max_new_tokens=8"):
        assert told(change) != first
    assert told(samples=4) != first
    config = tmp_path / "student" / "config.json"
    config.write_text(config.read_text() + "\n")
    differing = [key for key, value in told().items() if value != first[key]]
    assert differing == ["config_sha256"]
