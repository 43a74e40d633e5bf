"""Turns a row of a data set, whatever its columns, into a prompt with its gold answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sead_megatron.errors import UserError, alternatives
from sead_megatron.evaluation.grading import boxed_answers

# Dotted names reach into structs. The first one that the first row has is taken.
DETECTED = {
    "prompt": ("messages", "prompt", "problem", "question"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth", "final_answer", "expected_answer"),
    "solution": ("solution", "extra_info.solution"),
    "turns": ("turns",),
    "id": ("id", "extra_info.index", "unique_id", "uuid"),
    "domain": ("domain", "ability", "subject", "data_source"),
}
ROLES = ("system", "user", "assistant", "tool")
AssistantTurn = Literal["refuse", "solution", "turns"]
"""What a last message of the assistant is."""
# Who may speak after whom; the empty name is the beginning.
_FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_GSM8K_MARK = "####"


@dataclass(frozen=True)
class Columns:
    """Where a row keeps what; None: the data set has none."""

    prompt: str
    answer: str | None = None
    solution: str | None = None
    turns: str | None = None
    id: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Example:
    """A prompt before preparation; what is None the data set does not have."""

    id: str | None
    messages: list[dict[str, str]]
    answer: str | None
    domain: str | None
    solution: str | None
    turns: list[dict[str, str]] | None = None


def detect_columns(row: Mapping[str, object], where: str, chosen: Mapping[str, str | None]) -> Columns:
    """The columns of a data set whose first row is `row`; `chosen` holds those that the user named.

    Raises UserError, with the columns that were found, where a named one is missing or no prompt is recognised.
    """
    found: dict[str, str | None] = {}
    for role, candidates in DETECTED.items():
        name = chosen.get(role)
        if name is not None and not _has(row, name):
            raise UserError(
                f"--{role}-column",
                name,
                f"is no column of {where}; there are {_names(row)}",
                "name one of them",
            )
        usable = [candidate for candidate in candidates if _has(row, candidate)]
        if role == "turns":  # not a count of them, for example
            usable = [candidate for candidate in usable if _is_conversation(_get(row, candidate))]
        found[role] = name or next(iter(usable), None)
    prompt = found.pop("prompt")
    if prompt is None:
        wanted = alternatives(DETECTED["prompt"])
        raise UserError(
            where,
            None,
            f"has the columns {_names(row)}; none is {wanted}",
            "name the prompt's with --prompt-column",
        )
    return Columns(prompt, **found)


def read_example(
    row: Mapping[str, object], where: str, columns: Columns, *, assistant_turn: AssistantTurn = "refuse"
) -> Example:
    """One row as an example.

    The prompt is text (a single turn of the user) or a list of messages. An answer that ends in `#### 7` (GSM8K) is a
    solution and the answer 7; without an answer column the last box of the solution is the answer.
    `assistant_turn` takes a last turn of the assistant off and makes it the solution, or everything from its first turn
    on and makes it the turns. Raises UserError, naming `where`, for whatever is not as it should be.
    """
    prompt_place = f"{where}: {columns.prompt}"
    messages = _messages(_get(row, columns.prompt), prompt_place)
    solution = _text(row, columns.solution, where)
    turns, place, first = None, f"{where}: {columns.turns}", 0
    if columns.turns is not None and _get(row, columns.turns) is not None:
        turns = _messages(_get(row, columns.turns), place, "--turns-column")
    cut = _prompt_length(messages, assistant_turn)
    messages, taken = messages[:cut], messages[cut:]
    if taken and assistant_turn == "solution":
        solution = taken[0]["content"]
    elif taken:
        turns, place, first = taken, prompt_place, cut
    before = _check_prompt(messages, prompt_place)
    if turns is not None:
        _check_turns(turns, before, place, first)
    answer = _text(row, columns.answer, where)
    if answer is not None and _GSM8K_MARK in answer:
        worked, _, answer = answer.rpartition(_GSM8K_MARK)
        solution, answer = solution or worked.strip(), answer.strip()
    if answer is None and solution is not None:
        boxes = boxed_answers(solution)
        answer = boxes[-1] if boxes else None
    example = Example(
        _text(row, columns.id, where), messages, answer, _text(row, columns.domain, where), solution, turns
    )
    _check_unicode(example, where)
    return example


def _prompt_length(messages: list[dict[str, str]], assistant_turn: AssistantTurn) -> int:
    """How many of the messages stay the prompt."""
    if messages[-1]["role"] != "assistant" or assistant_turn == "refuse":
        return len(messages)
    if assistant_turn == "solution":
        return len(messages) - 1
    return next(index for index, message in enumerate(messages) if message["role"] == "assistant")


def _check_unicode(example: Example, where: str) -> None:
    """JSON can escape half a surrogate pair, which no file can hold."""
    contents = [message["content"] for message in (*example.messages, *(example.turns or ()))]
    for text in (*contents, example.id, example.answer, example.domain, example.solution):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                where,
                None,
                f"holds half a surrogate pair (character {error.start} of a text)",
                "correct the row, or --skip-malformed",
            ) from error


def _is_conversation(value: object) -> bool:
    """Nothing counts: a later row may have one."""
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _messages(value: object, where: str, option: str = "--prompt-column") -> list[dict[str, str]]:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(where, value, "must not be empty", "correct the row, or --skip-malformed")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(
            where,
            value,
            "must be text or a list of messages",
            f"name another {option}, or --skip-malformed",
        )
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(message: object, where: str) -> dict[str, str]:
    # A parquet file gives every message all keys of all messages; those that a message has not are None.
    kept = (
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else {}
    )
    if set(kept) != {"role", "content"} or not isinstance(kept["content"], str) or kept["role"] not in ROLES:
        raise UserError(
            where,
            message,
            f"must have a role ({alternatives(ROLES)}) and a content that is text, nothing else",
            "correct the row, or --skip-malformed",
        )
    return {"role": kept["role"], "content": kept["content"]}


def _check_prompt(messages: list[dict[str, str]], where: str) -> str:
    """The role of the last message, which somebody else than the student says."""
    before = _check_order(messages, "", where)
    if before not in ("user", "tool"):
        raise UserError(
            where,
            f"ends with {before or 'nothing'}",
            "the student answers the last message, which is the user's or a tool's",
            "use --assistant-turn solution or turns, name another --prompt-column, or --skip-malformed",
        )
    return before


def _check_turns(turns: list[dict[str, str]], before: str, where: str, first: int) -> None:
    """They follow a prompt whose last message is `before`'s; in the row they are numbered from `first`."""
    if _check_order(turns, before, where, first) != "assistant":
        raise UserError(
            where, f"ends with {turns[-1]['role']}", "the last turn is the assistant's", "correct the row"
        )


def _check_order(messages: list[dict[str, str]], before: str, where: str, first: int = 0) -> str:
    """The role of the last message, when each may follow the one before."""
    for index, message in enumerate(messages, first):
        if message["role"] not in _FOLLOWS[before]:
            raise UserError(
                f"{where}[{index}].role",
                message["role"],
                f"after {before or 'the beginning'} comes {alternatives(_FOLLOWS[before])}",
                "correct the row, or --skip-malformed",
            )
        if message["role"] == "user" and not message["content"].strip():
            raise UserError(
                f"{where}[{index}]", "", "must not be empty", "correct the row, or --skip-malformed"
            )
        before = message["role"]
    return before


def _text(row: Mapping[str, object], column: str | None, where: str) -> str | None:
    """Text of a column, numbers as they are written; None where there is nothing."""
    value = None if column is None else _get(row, column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # OlympiadBench keeps its only answer in a list
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: {column}",
            value,
            "must be text or a number",
            "name another column, or --skip-malformed",
        )
    return (value or "").strip() or None


def _get(row: Mapping[str, object], column: str) -> object:
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _has(row: Mapping[str, object], column: str) -> bool:
    parent, _, name = column.rpartition(".")
    inner = _get(row, parent) if parent else row
    return isinstance(inner, Mapping) and name in inner


def _names(row: Mapping[str, object]) -> str:
    names = []
    for name, value in row.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) else [name]
    return alternatives(names, "and")
