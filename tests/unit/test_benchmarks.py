"""Benchmark files: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import Problem, read_benchmark, read_benchmarks
from tests.tiny_inputs import write_jsonl

LAYOUT = "prompt (a list of role and content), reward_model.ground_truth and extra_info.index"


def row(index: Any = "AIME24-0", answer: str | None = "204", **changes: Any) -> dict[str, Any]:
    """As verl prepares data."""
    return {
        "prompt": [{"content": "How long?", "role": "user"}],
        "data_source": "AIME24",
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": "test"},
    } | changes


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema | None = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    return path


def mistake(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_benchmark(path)
    return str(caught.value).replace(str(path.parent), "DIR")


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "AIME24.parquet",
        [
            row(),
            row("AIME24-1", r"\boxed{5}", prompt=[{"role": "system", "content": "Be brief."},
                                                  {"role": "user", "content": "And now?"}]),
        ],
    )  # fmt: skip
    benchmark = read_benchmark(path)
    assert benchmark.name == "AIME24" and len(benchmark.sha256) == 64
    assert benchmark.problems == (
        Problem("AIME24-0", [{"role": "user", "content": "How long?"}], "204"),
        Problem(
            "AIME24-1",
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And now?"}],
            r"\boxed{5}",
        ),
    )


def test_parquet_with_numbers_as_index(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row(7), row(8)])
    assert [problem.id for problem in read_benchmark(path).problems] == ["7", "8"]


def test_jsonl(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}]
    entries = [
        {"id": "a", "messages": messages, "answer": "2"},
        {"id": "b", "prompt": "2 + 2?", "answer": "4"},
    ]
    assert read_benchmark(write_jsonl(tmp_path / "sums.jsonl", entries)).problems == (
        Problem("a", messages, "2"),
        Problem("b", [{"role": "user", "content": "2 + 2?"}], "4"),
    )


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    one, other = (
        read_benchmark(write_jsonl(tmp_path / f"{n}.jsonl", [{"id": "a", "prompt": "?", "answer": n}]))
        for n in "12"
    )
    assert one.sha256 != other.sha256


FOUND = "found prompt: {prompt}, data_source: string, ability: string, reward_model: {reward}, extra_info: {extra}"
PROMPT = "list<element: struct<content: string, role: string>>"
REWARD = "struct<ground_truth: string, style: string>"
EXTRA = "struct<index: string, split: string>"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prompt": "How long?"}, FOUND.format(prompt="string", reward=REWARD, extra=EXTRA)),
        ({"prompt": ["How long?"]}, FOUND.format(prompt="list<element: string>", reward=REWARD, extra=EXTRA)),
        ({"prompt": [{"text": "How long?"}]},
         FOUND.format(prompt="list<element: struct<text: string>>", reward=REWARD, extra=EXTRA)),
        ({"reward_model": "204"}, FOUND.format(prompt=PROMPT, reward="string", extra=EXTRA)),
        ({"reward_model": {"answer": "204"}},
         FOUND.format(prompt=PROMPT, reward="struct<answer: string>", extra=EXTRA)),
        ({"reward_model": {"ground_truth": 204}},
         FOUND.format(prompt=PROMPT, reward="struct<ground_truth: int64>", extra=EXTRA)),
        ({"extra_info": {"split": "test"}},
         FOUND.format(prompt=PROMPT, reward=REWARD, extra="struct<split: string>")),
        ({"extra_info": {"index": 0.5}},
         FOUND.format(prompt=PROMPT, reward=REWARD, extra="struct<index: double>")),
    ],
)  # fmt: skip
def test_other_columns(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    assert mistake(write_parquet(tmp_path / "a.parquet", [row(**changes)])) == (
        f'--benchmarks = "DIR/a.parquet": its columns must hold {LAYOUT}; {found}; rename the columns, or write '
        "JSONL with id, messages and answer"
    )


def test_columns_of_another_data_set(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"question": "1 + 1?", "answer": "2"}])
    assert mistake(path) == (
        f'--benchmarks = "DIR/a.parquet": its columns must hold {LAYOUT}; found question: string, answer: string; '
        "rename the columns, or write JSONL with id, messages and answer"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row()],
         'row 1: extra_info.index = "AIME24-0": already used in row 0; make indices unique'),
        ([row(), row(index=None)], "row 1: extra_info.index: must not be empty; number the rows"),
        ([row(answer=" ")], 'row 0: reward_model.ground_truth = " ": must not be empty; add the answer'),
        ([row(answer=None), row("AIME24-1")],
         "row 0: reward_model.ground_truth: must not be empty; add the answer"),
        ([row(prompt=[]), row("AIME24-1")],
         "row 0: prompt = []: must be messages with role and content; correct the row"),
        ([row(prompt=[{"role": "user", "content": None}]), row("AIME24-1")],
         'row 0: prompt = [{"role": "user", "content": null}]: must be messages with role and content; correct '
         "the row"),
    ],
)  # fmt: skip
def test_rows(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    assert mistake(write_parquet(tmp_path / "a.parquet", rows)) == f"DIR/a.parquet, {message}"


def test_no_rows(tmp_path: Path) -> None:
    schema = pyarrow.Table.from_pylist([row()]).schema
    assert mistake(write_parquet(tmp_path / "a.parquet", [], schema)) == (
        '--benchmarks = "DIR/a.parquet": holds no problem; give a file with one problem a row'
    )


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else, but long enough")
    assert mistake(tmp_path / "a.parquet").startswith(
        '--benchmarks = "DIR/a.parquet": cannot be read as parquet (Parquet magic bytes not found in footer.'
    )


def test_not_a_file_of_either_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,answer\n")
    assert mistake(tmp_path / "a.csv") == (
        '--benchmarks = "DIR/a.csv": must end in .jsonl or .parquet; convert the file to one of them'
    )
    assert mistake(tmp_path / "none.jsonl") == (
        '--benchmarks = "DIR/none.jsonl": no such file; give the path of a JSONL or parquet file'
    )


def test_jsonl_without_answers(tmp_path: Path) -> None:
    entries = [{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?", "answer": "2"}]
    assert mistake(write_jsonl(tmp_path / "a.jsonl", entries)) == (
        '--benchmarks = "DIR/a.jsonl": 1 of 2 problems have no answer to grade by: a; add answers or remove these '
        "problems"
    )


def test_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    entries = [{"id": "a", "prompt": "?", "answer": "2"}]
    paths = [str(write_jsonl(tmp_path / "a.jsonl", entries)), str(tmp_path / "other" / "a.parquet")]
    write_parquet(Path(paths[1]), [row()])
    with pytest.raises(UserError) as caught:
        read_benchmarks(paths)
    assert str(caught.value) == (
        f'--benchmarks = "{paths[1]}": has the name of {paths[0]}: results go to a.jsonl; give each file a name of '
        "its own"
    )
