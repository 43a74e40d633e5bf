"""Reads prompt files. Torch-free: prompts are checked before any model is loaded, and tokenised much
later."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from sead_megatron.errors import UserError, alternatives

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt as the file has it; `data.types.Prompt` adds the token ids."""

    id: str
    messages: list[dict[str, str]]
    answer: str | None
    domain: str | None
    solution: str | None = None
    turns: list[dict[str, str]] | None = None

    @property
    def fixed_response(self) -> str | list[dict[str, str]] | None:
        """What stands for a rollout in a batch of fixed responses."""
        return self.turns or self.solution


class AnyPrompt(Protocol):
    """What `PromptRecord` and `data.types.Prompt` have in common."""

    @property
    def id(self) -> str: ...

    @property
    def messages(self) -> list[dict[str, str]]: ...

    @property
    def answer(self) -> str | None: ...


def prompt_set_hash(prompts: Sequence[AnyPrompt]) -> str:
    """SHA-256 of ids, messages and answers; the order of the prompts does not matter."""
    lines = sorted(
        json.dumps([prompt.id, prompt.messages, prompt.answer], sort_keys=True) for prompt in prompts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_prompts(path: str | Path, what: str = "data.prompts") -> list[PromptRecord]:
    """Read JSONL: `{"id", "messages": [{"role", "content"}] or "prompt": text, "answer"?, "domain"?,
    "solution"?, "turns"?: [{"role", "content"}]}` a line.

    Other keys and blank lines are ignored. `what` names the field in errors. Raises UserError: no file, no
    prompt, a malformed line (with its number), a missing or ill-typed key, an id twice.
    """
    records: list[PromptRecord] = []
    lines: dict[str, int] = {}
    for number, entry in read_jsonl(path, what):
        where = f"{path}, line {number}"
        prompt_id = entry_id(entry, where)
        if prompt_id in lines:
            raise UserError(
                f"{where}: id", prompt_id, f"already used in line {lines[prompt_id]}", "make ids unique"
            )
        lines[prompt_id] = number
        records.append(
            PromptRecord(
                prompt_id,
                _messages(entry, where),
                _text(entry, "answer", where),
                _text(entry, "domain", where),
                _text(entry, "solution", where),
                _turns(entry, where),
            )
        )
    if not records:
        raise UserError(what, str(path), "holds no prompt", "give a JSONL file with one prompt a line")
    return records


def read_jsonl(path: str | Path, what: str) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, object) of every line that is not blank. Raises UserError with the line of a mistake."""
    path = Path(path)
    if not path.is_file():
        raise UserError(what, str(path), "no such file", "give the path of a JSONL file")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            yield number, json_object(line, f"{path}, line {number}")


def json_object(line: bytes, where: str) -> dict[str, object]:
    """The JSON object that a line holds. Raises UserError, naming `where`."""
    try:
        entry = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(where, None, f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        constraint = f"not valid JSON ({error.msg}, column {error.colno})"
        raise UserError(where, None, constraint, "write one JSON object a line") from error
    if not isinstance(entry, dict):
        raise UserError(where, entry, "must be a JSON object", "write one JSON object a line")
    return entry


def entry_id(entry: dict[str, object], where: str) -> str:
    """The `id` of a line: text that is not empty."""
    value = entry.get("id")
    if not isinstance(value, str) or not value:
        constraint = "must be text that is not empty" if "id" in entry else "missing"
        raise UserError(f"{where}: id", value, constraint, "give every line an id of its own")
    return value


def _messages(entry: dict[str, object], where: str) -> list[dict[str, str]]:
    if ("prompt" in entry) == ("messages" in entry):
        constraint = "needs exactly one of `messages` and `prompt`"
        raise UserError(where, None, constraint, 'write for example "prompt": "What is 1 + 1?"')
    if "prompt" in entry:
        text = entry["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where}: prompt", text, "must be text that is not empty", "correct or remove the line"
            )
        return [{"role": "user", "content": text}]
    messages = _conversation(entry["messages"], f"{where}: messages", "add a user's message")
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: messages[{len(messages) - 1}].role",
            "assistant",
            "the student answers the last message",
            "drop the assistant's turn",
        )
    return messages


def _turns(entry: dict[str, object], where: str) -> list[dict[str, str]] | None:
    """A fixed response of several turns: the assistant's first and last, never two of its in a row."""
    value = entry.get("turns")
    if value is None:
        return None
    where = f"{where}: turns"
    turns = _conversation(value, where, "add the assistant's messages, or remove the key")
    roles = [turn["role"] for turn in turns]
    for index in (0, len(roles) - 1):
        if roles[index] != "assistant":
            raise UserError(
                f"{where}[{index}].role",
                roles[index],
                "the first and the last turn are the assistant's",
                "correct the turns",
            )
    for index, (role, following) in enumerate(pairwise(roles), start=1):
        if following == "system" or role == following == "assistant":
            raise UserError(
                f"{where}[{index}].role", following, f"cannot follow a turn of {role}", "correct the turns"
            )
    return turns


def _conversation(value: object, where: str, remedy: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(where, value, "must be a list that is not empty", remedy)
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise UserError(
            where, message, "must have the keys role and content, no others", "correct the message"
        )
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise UserError(f"{where}.role", role, f"must be {alternatives(_ROLES)}", "correct the role")
    if not isinstance(content, str):
        raise UserError(f"{where}.content", content, "must be text", "correct the content")
    return {"role": role, "content": content}


def _text(entry: dict[str, object], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {key}", value, "must be text", "put it in quotes")
    return value


def check_prompt_lengths(lengths: Sequence[tuple[str, int]], max_model_len: int, max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for a whole response.

    `lengths` holds (id, tokens of the rendered prompt). Raises UserError unless every prompt has at most
    `max_model_len - max_new_tokens` tokens; it names how many do not, and the longest.
    """
    room = max_model_len - max_new_tokens
    long = [(tokens, prompt_id) for prompt_id, tokens in lengths if tokens > room]
    if long:
        tokens, prompt_id = max(long)
        raise UserError(
            "rollout.max_model_len",
            max_model_len,
            f"leaves {room} tokens for a prompt beside max_new_tokens ({max_new_tokens}), but {len(long)} of "
            f"{len(lengths)} prompts are longer, the longest {prompt_id!r} with {tokens}",
            f"use at least {tokens + max_new_tokens}, or shorten or remove these prompts",
        )
