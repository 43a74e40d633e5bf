"""tools/prepare_data.py from files to files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.data.preparation import sources
from sead_megatron.data.preparation.instructions import BOXED
from sead_megatron.data.prompts import read_prompts
from tests.preparation_inputs import DAPO_PREFIX, DAPO_SUFFIX, dapo_row, write_parquet
from tests.tiny_inputs import write_jsonl

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools/prepare_data.py")
assert SPEC is not None and SPEC.loader is not None
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

SPIDER = "A spider walks along 12 edges of a cube with side 7 and never turns back. How many ways end where it began?"
TRIPLES = "Find the number of ordered triples of positive integers whose sum is 30 and whose product is even"
PAIRS = "Find the number of ordered pairs of primes whose sum is 48 and whose difference is small"
DAPO = [
    dapo_row("a", TRIPLES, "5"),
    dapo_row("b", SPIDER.replace("cube", "$\\mathrm{cube}$") + "\n", "9"),  # the benchmark's
    dapo_row("c", f"{TRIPLES.lower()}.", "5"),  # equals a
    dapo_row("d", TRIPLES.replace("Find", "Compute"), "5"),  # nearly a
    dapo_row("e", "What is $1 + 1$?", "2"),
    dapo_row("f", "what is 1+1?", "3"),  # contradicts e
    dapo_row("g", PAIRS, "4"),
    dapo_row("h", TRIPLES.replace("30", "31"), "6"),
    dapo_row(
        "i",
        f"Really: {SPIDER.replace('never', 'seldom').replace('back', 'round').replace('along', 'on')}",
        "9",
    ),
    dapo_row("j", PAIRS.replace("Find", "Compute"), "-4"),  # looks like g
]


def run(*arguments: object) -> int:
    code: int = TOOL.main([str(argument) for argument in arguments])
    return code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def dapo(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "spiders.jsonl", [{"id": "s", "problem": "Why?"}, {"id": "t", "problem": SPIDER}])
    return write_parquet(tmp_path / "dapo.parquet", DAPO)


def test_whole_conversations_are_compared(tmp_path: Path) -> None:
    """A benchmark's question in a later turn is found, and one opening does not make two conversations equal."""
    write_jsonl(tmp_path / "spiders.jsonl", [{"id": "t", "problem": SPIDER}])
    asked = (TRIPLES, SPIDER, PAIRS)
    rows = [
        {
            "id": f"c{i}",
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(
                    ("user", "assistant") * 2, ("Hello!", "Hello.", text, "\\boxed{5}"), strict=True
                )
            ],
        }
        for i, text in enumerate(asked)
    ]
    out = tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "chats.jsonl", rows)
    assert run(source, out, "--benchmark", tmp_path / "spiders.jsonl", "--assistant-turn", "turns") == 0
    assert [(prompt.id, len(prompt.turns or ())) for prompt in read_prompts(out)] == [("c0", 3), ("c2", 3)]
    assert jsonl(tmp_path / "out.jsonl.removed.jsonl")[0]["reason"] == "contaminated"


def test_whole(dapo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/train.jsonl"
    assert run(dapo, out, "--benchmark", tmp_path / "spiders.jsonl", "--near-duplicates", "0.4") == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if "written" in line] == [["written", "4"]]
    assert [prompt.id for prompt in read_prompts(out)] == ["a", "g", "h", "j"]
    assert jsonl(out)[0] == {
        "id": "a",
        "messages": [{"role": "user", "content": f"{DAPO_PREFIX}{TRIPLES}{DAPO_SUFFIX}"}],
        "answer": "5",
        "domain": "MATH",
    }
    removed = {
        row["id"]: (row["place"], row["reason"], row["of"])
        for row in jsonl(out.with_name("train.jsonl.removed.jsonl"))
    }
    assert removed == {
        "b": ("dapo.parquet, row 2", "contaminated", "spiders.jsonl: t"),
        "c": ("dapo.parquet, row 3", "duplicate", "a"),
        "d": ("dapo.parquet, row 4", "near duplicate", "a"),
        "e": ("dapo.parquet, row 5", "conflicting answers", "f"),
        "f": ("dapo.parquet, row 6", "conflicting answers", "e"),
        # Too far from the benchmark's wording, but nearly b.
        "i": ("dapo.parquet, row 9", "contaminated", "spiders.jsonl: t"),
    }  # fmt: skip
    (lookalike,) = jsonl(out.with_name("train.jsonl.lookalikes.jsonl"))
    assert (lookalike["id"], lookalike["of"]) == ("j", "g")
    provenance = json.loads(out.with_name("train.jsonl.provenance.json").read_text())
    digest = subprocess.run(["sha256sum", dapo], capture_output=True, text=True, check=True).stdout.split()[0]
    assert provenance["source"]["sha256"] == {"dapo.parquet": digest}
    assert provenance["counts"] == {
        "rows": 10,
        "removed": {"malformed": 0, "contaminated": 2, "conflicting answers": 2, "duplicate": 1, "near duplicate": 1},
        "written": 4,
        "lookalikes kept": 1,
        "questions": {"spiders.jsonl": {"asked": 2, "found": 1}},
    }  # fmt: skip
    assert provenance["statistics"] == {
        "problem characters": {"shortest": 88, "median": 91, "95 %": 97, "longest": 97},
        "answers": {"integer": 4},
        "domains": {"MATH": 4},
        "messages": {"1": 4},
        "solutions": 0,
        "turns": 0,
    }
    assert str(tmp_path) not in "".join(file.read_text() for file in out.parent.iterdir())


def test_instruction_and_conflicts(dapo: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.jsonl"
    assert run(dapo, out, "--instruction", "boxed", "--conflicts", "first", "--domain", "sums") == 0
    rows = {row["id"]: row for row in jsonl(out)}
    assert list(rows) == ["a", "b", "e", "g", "h", "i", "j"] and rows["e"]["answer"] == "2"
    assert rows["a"]["messages"] == [{"role": "user", "content": f"{TRIPLES}\n\n{BOXED}"}]
    assert {row["domain"] for row in rows.values()} == {"sums"}
    # What was prepared can be prepared again: our own instruction is known too.
    assert run(out, tmp_path / "again.jsonl", "--instruction", "boxed") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_same_bytes_whatever_the_hash_seed(dapo: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        command = [sys.executable, ROOT / "tools/prepare_data.py", dapo, tmp_path / seed / "train.jsonl",
                   "--benchmark", tmp_path / "spiders.jsonl"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / seed).iterdir()} for seed in "12")
    assert first == second and len(first) == 4


def test_malformed_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        '{"question": "1 + 1?"}\n\n{"question": ""}\n{"question"\n{"question": "2 + 2?", "answer": []}\n'
    )
    out = tmp_path / "out.jsonl"
    assert refusal(capsys, source, out) == (
        f'error: {source}, row 3: question = "": must not be empty; correct the row, or --skip-malformed'
    )
    assert not out.exists()
    assert run(source, out, "--skip-malformed") == 0
    # Ids by line; the answer column is not in the first row.
    assert [row["id"] for row in jsonl(out)] == ["rows-1", "rows-5"]
    removed = jsonl(out.with_name("out.jsonl.removed.jsonl"))
    assert [(row["place"], row["reason"]) for row in removed] == [
        ("rows.jsonl, row 3", "malformed"), ("rows.jsonl, row 4", "malformed")
    ]  # fmt: skip
    assert removed[1]["error"].startswith("rows.jsonl, row 4: not valid JSON")
    # Columns that are not known are no matter of a row.
    assert "name the prompt's with --prompt-column" in refusal(
        capsys, write_jsonl(tmp_path / "x.jsonl", [{"text": "1"}]), tmp_path / "y.jsonl", "--skip-malformed"
    )


def test_directory(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    write_parquet(data / "train-1.parquet", [{"problem": "1 + 1?"}, {"problem": "2 + 2?"}])
    write_jsonl(data / "more/train-0.jsonl", [{"problem": "3 + 3?"}])
    write_jsonl(data / "test.jsonl", [{"problem": "4 + 4?"}])
    assert run(data, tmp_path / "all.jsonl") == 0
    assert [row["id"] for row in jsonl(tmp_path / "all.jsonl")] == [
        "train-0-1",
        "test-1",
        "train-1-1",
        "train-1-2",
    ]
    assert run(data, tmp_path / "train.jsonl", "--split", "train") == 0
    assert [row["id"] for row in jsonl(tmp_path / "train.jsonl")] == ["train-0-1", "train-1-1", "train-1-2"]
    provenance = json.loads((tmp_path / "train.jsonl.provenance.json").read_text())
    assert list(provenance["source"]["sha256"]) == ["more/train-0.jsonl", "train-1.parquet"]


def test_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An id twice is no harm where the rows are the same, as in the published DAPO-Math-17k.
    rows = [dapo_row("a", TRIPLES, "5"), dapo_row("a", TRIPLES, "5"), dapo_row("b", PAIRS, "1")]
    assert run(write_parquet(tmp_path / "same.parquet", rows), tmp_path / "same.jsonl") == 0
    rows[1] = dapo_row("b", SPIDER, "5")
    source = write_parquet(tmp_path / "twice.parquet", rows)
    assert refusal(capsys, source, tmp_path / "out.jsonl") == (
        f'error: {source}, row 3: id = "b": is also that of twice.parquet, row 2, which asks something else; '
        "name another --id-column, or correct the ids"
    )


def test_refusals(dapo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.jsonl"
    out.write_text("precious")
    assert refusal(capsys, dapo, out).endswith("exists; give another name, or --overwrite")
    assert out.read_text() == "precious"
    assert run(dapo, out, "--overwrite") == 0 and out.read_text() != "precious"
    out.unlink()
    assert refusal(capsys, dapo, out).startswith(f'error: OUT = "{out}.removed.jsonl": exists')
    assert "is read as well" in refusal(capsys, dapo, dapo, "--overwrite")
    assert "is a directory" in refusal(capsys, dapo, tmp_path, "--overwrite")
    other = tmp_path / "other.jsonl"
    assert "no such file or directory" in refusal(capsys, tmp_path / "none.parquet", other)
    assert "--benchmark" in refusal(capsys, dapo, other, "--benchmark", tmp_path / "none.parquet")
    assert "is the name of two of them" in refusal(capsys, dapo, other, "--benchmark", dapo, dapo)
    assert "must end in .parquet or .jsonl" in refusal(capsys, ROOT / "README.md", other)
    assert "is for a directory or the hub" in refusal(capsys, dapo, other, "--split", "train")
    assert "is for the hub" in refusal(capsys, dapo, other, "--config", "main")
    assert "holds no .parquet and no .jsonl" in refusal(capsys, ROOT / "docs", other)
    assert "is not a number from 0 to 1" in refusal(capsys, dapo, other, "--coverage", "nan")
    assert "is not a positive integer" in refusal(capsys, dapo, other, "--ngram", "0")
    (tmp_path / "broken.parquet").write_bytes(dapo.read_bytes()[:-9])
    assert "cannot be read as parquet" in refusal(capsys, tmp_path / "broken.parquet", other)
    assert "holds no row that can be used" in refusal(
        capsys, write_jsonl(tmp_path / "empty.jsonl", []), other
    )
    assert "has no row left" in refusal(capsys, dapo, other, "--benchmark", dapo)
    assert not other.exists()


def test_without_datasets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert refusal(capsys, "hub:someone/something", tmp_path / "out.jsonl") == (
        'error: SOURCE = "hub:someone/something": needs the package datasets, which is not installed; pip install '
        "'sead_megatron[hub]', or download the files and name their directory"
    )


HUB = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("prepare_data", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
assert "torch" not in sys.modules
print(tool.main(["hub:./set", "out.jsonl"]))
print(tool.main(["hub:./set", "other.jsonl", "--split", "exam"]))
print(tool.main(["hub:nobody/nothing", "other.jsonl"]))
"""


def test_hub(tmp_path: Path) -> None:
    """`datasets` loads a directory as it does a data set of the hub."""
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set/test.parquet", [{"problem": "1 + 1?", "answer": 2}])
    rows = [{"problem": "2 + 2?", "answer": 4}, {"problem": "3 + 3?", "answer": 6}]
    write_parquet(tmp_path / "set/train.parquet", rows)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, str(ROOT / "tools/prepare_data.py")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in ended.stdout.splitlines() if line in "02"] == ["0", "2", "2"]
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and all("cannot be loaded (" in error for error in errors)
    assert [(row["id"], row["answer"]) for row in jsonl(tmp_path / "out.jsonl")] == [
        ("set-1", "4"),
        ("set-2", "6"),
    ]
