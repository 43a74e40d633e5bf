"""Columns of the common layouts, malformed rows, and the instructions around problems."""

from __future__ import annotations

from typing import Any

import pytest

from sead_megatron.data.preparation.instructions import BOXED, WRAPPERS, unwrap, with_instruction
from sead_megatron.data.preparation.layouts import Columns, Example, detect_columns, read_example
from sead_megatron.errors import UserError
from tests.preparation_inputs import CHINESE, DAPO_PREFIX, DAPO_SUFFIX, dapo_row

USER = {"role": "user", "content": "1 + 1?"}
MATH = {"problem": "1 + 1?", "solution": "It is $\\boxed{2}$.", "subject": "Algebra"}
TURNS = [
    {"role": "assistant", "content": "calculator: 1 + 1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "\\boxed{2}"},
]
GSM8K = {"question": "1 + 1?", "answer": "One and one.\n#### 2"}
LAYOUTS: dict[str, tuple[dict[str, Any], Columns, Example]] = {
    "verl": (
        dapo_row("u-1", "1 + 1?", "2"),
        Columns("prompt", "reward_model.ground_truth", None, None, "extra_info.index", "ability"),
        Example("u-1", [{"role": "user", "content": f"{DAPO_PREFIX}1 + 1?{DAPO_SUFFIX}"}], "2", "MATH", None),
    ),
    "MATH": (MATH, Columns("problem", None, "solution", None, None, "subject"),
             Example(None, [USER], "2", "Algebra", MATH["solution"])),
    "GSM8K": (GSM8K, Columns("question", "answer"), Example(None, [USER], "2", None, "One and one.")),
    "OlympiadBench": (
        {"id": 7, "question": "1 + 1?", "final_answer": ["2"], "domain": None},
        Columns("question", "final_answer", None, None, "id", "domain"),
        Example("7", [USER], "2", None, None),
    ),
    "ours": (
        {"id": "a", "messages": [USER], "answer": "2", "solution": "Count.", "turns": TURNS, "domain": "sums"},
        Columns("messages", "answer", "solution", "turns", "id", "domain"),
        Example("a", [USER], "2", "sums", "Count.", TURNS),
    ),
    "messages before problem": (
        {"problem": "1 + 1?", "messages": [{**USER, "name": None}]},
        Columns("messages"),
        Example(None, [USER], None, None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    row, columns, example = LAYOUTS[name]
    assert detect_columns(row, "FILE, row 1", {}) == columns
    assert read_example(row, "FILE, row 1", columns) == example


def test_named_columns() -> None:
    row = {"prompt": "no", "meta": {"text": "1 + 1?", "gold": 2.5}, "key": 3}
    chosen = {"prompt": "meta.text", "answer": "meta.gold", "id": "key"}
    columns = detect_columns(row, "FILE, row 1", chosen)
    assert columns == Columns("meta.text", "meta.gold", None, None, "key")
    assert read_example(row, "FILE, row 1", columns) == Example("3", [USER], "2.5", None, None)


def test_unknown_columns() -> None:
    row = {"text": "1 + 1?", "meta": {"a": 1, "b": 2}}
    with pytest.raises(UserError) as error:
        detect_columns(row, "FILE, row 1", {})
    assert str(error.value) == (
        "FILE, row 1: has the columns text, meta.a and meta.b; none is messages, prompt, problem or question; name "
        "the prompt's with --prompt-column"
    )
    with pytest.raises(UserError) as error:
        detect_columns(row, "FILE, row 1", {"answer": "meta.c"})
    assert str(error.value) == (
        '--answer-column = "meta.c": is no column of FILE, row 1; there are text, meta.a and meta.b; name one of them'
    )


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize(
    "roles",
    [("user",), ("system", "user"), ("user", "assistant", "user"),
     ("system", "user", "assistant", "tool", "tool", "assistant", "user"), ("user", "assistant", "tool")],
)  # fmt: skip
def test_turns_pass_through(roles: tuple[str, ...]) -> None:
    messages = turns(*roles)
    assert read_example({"messages": messages}, "FILE, row 1", Columns("messages")).messages == messages


MALFORMED: list[tuple[object, str]] = [
    (None, ' = null: must be text or a list of messages'),
    ("\n", ' = "\\n": must not be empty'),
    ([], " = []: must be text or a list of messages"),
    (["hi"], '[0] = "hi": must have a role (system, user, assistant or tool) and a content that is text'),
    ([{"role": "human", "content": "x"}], "[0] = {"),
    ([{"role": "user", "content": [{"type": "image"}]}], "[0] = {"),
    ([{"role": "user", "content": "x", "name": "y"}], "[0] = {"),
    (turns("assistant", "user"), '[0].role = "assistant": after the beginning comes system or user'),
    (turns("user", "user"), '[1].role = "user": after user comes assistant'),
    (turns("user", "system"), '[1].role = "system": after user comes assistant'),
    (turns("user", "tool"), '[1].role = "tool": after user comes assistant'),
    ([{"role": "user", "content": " "}], '[0] = "": must not be empty'),
    (turns("user", "assistant"), ' = "ends with assistant": the student answers the last message'),
    (turns("system"), ' = "ends with system": the student answers the last message'),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), MALFORMED)
def test_malformed_messages(messages: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_example({"messages": messages}, "FILE, row 3", Columns("messages"))
    expected = "FILE, row 3: messages" + message.replace(" = null", "")
    assert str(error.value).startswith(expected) and "--skip-malformed" in str(error.value)


@pytest.mark.parametrize("answer", [True, ["1", "2"], {"a": 1}])
def test_malformed_answers(answer: object) -> None:
    with pytest.raises(UserError, match=r"^FILE, row 3: answer = .*: must be text or a number"):
        read_example({"prompt": "x", "answer": answer}, "FILE, row 3", Columns("prompt", "answer"))


@pytest.mark.parametrize("key", ["prompt", "answer", "solution", "id", "domain", "turns"])
def test_half_a_surrogate_pair(key: str) -> None:
    row = {"prompt": "x", "answer": "1", "solution": "y", "id": "z", "domain": "d", key: "ab\ud800"}
    if key == "turns":
        row[key] = [{"role": "assistant", "content": "ab\ud800"}]
    columns = Columns("prompt", "answer", "solution", "turns", "id", "domain")
    with pytest.raises(
        UserError, match=r"^FILE, row 3: holds half a surrogate pair \(character 2 of a text\)"
    ):
        read_example(row, "FILE, row 3", columns)


def test_assistant_turn_as_solution() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "So \\boxed{1}, no, \\boxed{2}."}]}
    example = read_example(row, "FILE, row 1", Columns("messages"), assistant_turn="solution")
    assert example == Example(None, [USER], "2", None, "So \\boxed{1}, no, \\boxed{2}.")


def test_turns_of_a_conversation() -> None:
    """The assistant's turns and what is between them; a system message and the first question stay the prompt."""
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, USER, *TURNS]}
    example = read_example(row, "FILE, row 1", Columns("messages"), assistant_turn="turns")
    assert example == Example(None, [system, USER], None, None, None, TURNS)
    last = read_example(row, "FILE, row 1", Columns("messages"), assistant_turn="solution")
    assert last == Example(None, [system, USER, *TURNS[:-1]], "2", None, TURNS[-1]["content"])


def test_turns_that_are_no_conversation_are_another_column() -> None:
    assert detect_columns({"prompt": "x", "turns": 3}, "FILE, row 1", {}).turns is None
    assert detect_columns({"prompt": "x", "turns": ["a"]}, "FILE, row 1", {}).turns is None
    assert detect_columns({"prompt": "x", "turns": None}, "FILE, row 1", {}).turns == "turns"
    assert detect_columns({"prompt": "x", "talk": 3}, "FILE, row 1", {"turns": "talk"}).turns == "talk"


def test_turns_of_the_prompt_column_keep_their_numbers() -> None:
    row = {"messages": [USER, TURNS[0], {"role": "user", "content": " "}, TURNS[2]], "turns": TURNS}
    columns = Columns("messages", turns="turns")
    with pytest.raises(UserError, match=r'^FILE, row 1: messages\[2\] = "": must not be empty'):
        read_example(row, "FILE, row 1", columns, assistant_turn="turns")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER], 'turns[0].role = "user": after user comes assistant; correct the row, or --skip-malformed'),
        (TURNS[:2], 'turns = "ends with tool": the last turn is the assistant\'s; correct the row'),
    ],
)
def test_turns_out_of_order(turns: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_example({"prompt": "x", "turns": turns}, "FILE, row 3", Columns("prompt", turns="turns"))
    assert str(error.value) == f"FILE, row 3: {message}"


def test_wrappers() -> None:
    assert unwrap(f"{DAPO_PREFIX}1 + 1?{DAPO_SUFFIX}") == ("1 + 1?", ("DAPO",))
    assert unwrap(f"{DAPO_PREFIX}1 + 1?{CHINESE}{DAPO_SUFFIX}") == ("1 + 1?", ("DAPO", "DAPO, Chinese"))
    assert unwrap(f"1 + 1?\n\n{BOXED}") == ("1 + 1?\n", ("boxed",))
    # Half a wrapper, or one that overlaps itself, is text like any other.
    for text in (
        f"{DAPO_PREFIX}1 + 1?",
        f"1 + 1?{DAPO_SUFFIX}",
        "Answer: $Answer",
        DAPO_PREFIX[:-1] + DAPO_SUFFIX,
    ):
        assert unwrap(text) == (text, ())
    assert all(wrapper.suffix for wrapper in WRAPPERS)


def test_instructions() -> None:
    messages = [
        {"role": "system", "content": f"{DAPO_PREFIX}x{DAPO_SUFFIX}"},
        {"role": "user", "content": f"{DAPO_PREFIX}1 + 1? {DAPO_SUFFIX}"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    assert with_instruction(messages, "keep") == messages
    bare = [messages[0], USER, *messages[2:]]
    assert with_instruction(messages, "none") == bare
    last = {"role": "user", "content": f"And 2 + 2?\n\n{BOXED}"}
    assert with_instruction(messages, "boxed") == [*bare[:3], last]
    assert with_instruction([*bare[:3], last], "boxed") == [*bare[:3], last]  # not twice
