"""Prompt and difficulty files: what is read, and the exact line of each mistake."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.data.difficulty import read_difficulties
from sead_megatron.data.prompts import PromptRecord, check_prompt_lengths, prompt_set_hash, read_prompts
from sead_megatron.errors import UserError
from tests.tiny_inputs import write_jsonl


def mistake(call: Callable[..., Any], path: Path, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        call(path, *arguments)
    return str(error.value).replace(str(path), "FILE")


def records(*ids: str) -> list[PromptRecord]:
    return [PromptRecord(name, [{"role": "user", "content": f"What is {name}?"}], "1", None) for name in ids]


def test_both_forms(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"id": "a", "messages": messages, "answer": "2", "source": "x"},
            {"id": "b", "prompt": "2 + 2?", "domain": "math"},
        ],
    )
    path.write_text(path.read_text() + "\n  \n")
    assert read_prompts(path) == [
        PromptRecord("a", messages, "2", None),
        PromptRecord("b", [{"role": "user", "content": "2 + 2?"}], None, "math"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "FILE, line 2: not valid JSON (Expecting property name enclosed in double quotes, column 2); "
              "write one JSON object a line"),
        ("[]", "FILE, line 2 = []: must be a JSON object; write one JSON object a line"),
        ('{"prompt": "x"}', "FILE, line 2: id: missing; give every line an id of its own"),
        ('{"id": 7, "prompt": "x"}',
         "FILE, line 2: id = 7: must be text that is not empty; give every line an id of its own"),
        ('{"id": "a", "prompt": "x"}', 'FILE, line 2: id = "a": already used in line 1; make ids unique'),
        ('{"id": "b"}', "FILE, line 2: needs exactly one of `messages` and `prompt`; "
                        'write for example "prompt": "What is 1 + 1?"'),
        ('{"id": "b", "prompt": "x", "messages": []}',
         "FILE, line 2: needs exactly one of `messages` and `prompt`; "
         'write for example "prompt": "What is 1 + 1?"'),
        ('{"id": "b", "prompt": " "}',
         'FILE, line 2: prompt = " ": must be text that is not empty; correct or remove the line'),
        ('{"id": "b", "messages": []}',
         "FILE, line 2: messages = []: must be a list that is not empty; add a user's message"),
        ('{"id": "b", "messages": [{"role": "user"}]}',
         'FILE, line 2: messages[0] = {"role": "user"}: must have the keys role and content, no others; '
         "correct the message"),
        ('{"id": "b", "messages": [{"role": "human", "content": "x"}]}',
         'FILE, line 2: messages[0].role = "human": must be system, user, assistant or tool; correct the '
         'role'),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
         'FILE, line 2: messages[1].role = "assistant": the student answers the last message; '
         "drop the assistant's turn"),
        ('{"id": "b", "messages": [{"role": "user", "content": 1}]}',
         "FILE, line 2: messages[0].content = 1: must be text; correct the content"),
        ('{"id": "b", "prompt": "x", "answer": 4}', "FILE, line 2: answer = 4: must be text; put it in "
                                                    "quotes"),
    ],
)  # fmt: skip
def test_each_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n' + line + "\n")
    assert mistake(read_prompts, path) == message


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert mistake(read_prompts, path) == 'data.prompts = "FILE": no such file; give the path of a JSONL file'
    path.write_text("\n")
    message = 'data.prompts = "FILE": holds no prompt; give a JSONL file with one prompt a line'
    assert mistake(read_prompts, path) == message
    path.write_bytes(b'{"id": "a", "prompt": "x"}\n{"id": "\xff"}\n')
    assert mistake(read_prompts, path) == "FILE, line 2: not UTF-8 (byte 8); save the file as UTF-8"


def test_difficulties(tmp_path: Path) -> None:
    provenance = {"model": "m", "rollouts": 8}
    entries = [
        {"id": "a", "difficulty": 0},
        {"id": "b", "difficulty": 0.125},
        {"id": "other", "difficulty": 1},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [{"provenance": provenance}, *entries])
    told = read_difficulties(path, records("b", "a"))
    assert (told.values, told.provenance) == ({"a": 0.0, "b": 0.125, "other": 1.0}, provenance)
    assert read_difficulties(write_jsonl(tmp_path / "e.jsonl", entries), records("a")).provenance is None


def test_difficulties_of_some_prompts_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "difficulty": 0}])
    head, remedy = 'curriculum.difficulty = "FILE"', "estimate the difficulty of the same prompt file"
    assert mistake(read_difficulties, path, records(*"abc")) == (
        f"{head}: has no difficulty for 2 of 3 prompts: b, c; {remedy}"
    )
    assert mistake(read_difficulties, path, records(*"abcde")) == (
        f"{head}: has no difficulty for 4 of 5 prompts: b, c, d, ...; {remedy}"
    )


def test_difficulties_of_other_prompts(tmp_path: Path) -> None:
    """The hash in the provenance holds ids, messages and answers, in any order."""
    prompts = records("a", "b")
    entries = [{"id": name, "difficulty": 0.5} for name in "abc"]
    provenance = {"provenance": {"prompts_sha256": prompt_set_hash(prompts)}}
    path = write_jsonl(tmp_path / "d.jsonl", [provenance, *entries])
    assert read_difficulties(path, prompts[::-1]).values["b"] == 0.5
    others = [
        records("a"),
        records("a", "b", "c"),
        [prompts[0], replace(prompts[1], answer="2")],
        [prompts[0], replace(prompts[1], messages=[{"role": "user", "content": "What is B?"}])],
    ]
    for other in others:
        assert mistake(read_difficulties, path, other) == (
            'curriculum.difficulty = "FILE": was estimated for other prompts (prompts_sha256 of its first line is not '
            "that of the prompt file); estimate again, or remove the first line to use it all the same"
        )
        write_jsonl(path, entries)
        assert read_difficulties(path, other).provenance is None
        write_jsonl(path, [provenance, *entries])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b"}', "FILE, line 2: difficulty: missing; write 1 - pass rate"),
        ('{"id": "b", "difficulty": 1.01}',
         "FILE, line 2: difficulty = 1.01: must be a number from 0 to 1; write 1 - pass rate"),
        ('{"id": "b", "difficulty": NaN}',
         "FILE, line 2: difficulty = NaN: must be a number from 0 to 1; write 1 - pass rate"),
        ('{"id": "b", "difficulty": true}',
         "FILE, line 2: difficulty = true: must be a number from 0 to 1; write 1 - pass rate"),
        ('{"id": "a", "difficulty": 0}', 'FILE, line 2: id = "a": already has a difficulty; make ids unique'),
        ('{"provenance": {}}', "FILE, line 2: id: missing; give every line an id of its own"),
    ],
)  # fmt: skip
def test_each_bad_difficulty(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "difficulty": 0.5}\n' + line + "\n")
    assert mistake(read_difficulties, path, records("a")) == message


def test_prompt_lengths() -> None:
    check_prompt_lengths([("a", 6), ("b", 1)], max_model_len=16, max_new_tokens=10)
    with pytest.raises(UserError) as error:
        check_prompt_lengths([("a", 7), ("b", 6), ("c", 9)], max_model_len=16, max_new_tokens=10)
    assert str(error.value) == (
        "rollout.max_model_len = 16: leaves 6 tokens for a prompt beside max_new_tokens (10), but 2 of 3 "
        "prompts are "
        "longer, the longest 'c' with 9; use at least 19, or shorten or remove these prompts"
    )
