"""Fixed responses of several turns: which tokens follow a prompt, and which of them the assistant writes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import Tokenizer

Message = dict[str, str]


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], turns: Sequence[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Ids of what follows the rendered `messages`, up to the end of the last turn, and which are the assistant's.

    `turns` begin and end with the assistant, and never have two of its in a row. Its tokens are those of its text,
    without spaces around it, and the end of sequence that follows: what it would sample. All else, up to the next
    generation prompt, is as the chat template has it. Each of the two is encoded by itself, as prompts and responses
    are in rollouts. No turn of the assistant is rendered as the last message, which templates treat differently.

    Raises UserError, naming `where`, without a chat template, and where the template writes a turn of the assistant
    otherwise than it is, changes earlier turns or leaves one out.
    """
    done, conversation = tokenizer.render(messages), list(messages)
    if done is None:
        raise UserError(f"{where}: turns", None, "need a chat template", "use a solution, or add a template")
    ids: list[int] = []
    own: list[bool] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        content = turn["content"].strip()
        body = tokenizer.encode_text(content)
        others = list(takewhile(lambda other: other["role"] != "assistant", turns[index + 1 :]))
        if not others:
            rest, ends = list(tokenizer.eos_ids[:1]), 1
        else:
            conversation += [turn, *others]
            text = tokenizer.render(conversation) or ""
            _check_heard(tokenizer, conversation, len(others), text, where)
            rest, ends = _after(tokenizer, text, done, content, f"{where}: turns[{index}]")
            done = text
        ids += body + rest
        own += [True] * (len(body) + ends) + [False] * (len(rest) - ends)
    return ids, own


def _check_heard(
    tokenizer: Tokenizer, conversation: Sequence[Message], count: int, text: str, where: str
) -> None:
    """Is what the last `count` messages say in the rendered `text`? A template may not know tools."""
    for index in range(len(conversation) - count, len(conversation)):
        other = {**conversation[index], "content": conversation[index]["content"] + "."}
        if tokenizer.render([*conversation[:index], other, *conversation[index + 1 :]]) == text:
            raise UserError(
                f"{where}: turns",
                conversation[index]["role"],
                "the chat template leaves out what this role says",
                "give these turns another role, or use another template",
            )


def _after(tokenizer: Tokenizer, text: str, done: str, content: str, where: str) -> tuple[list[int], int]:
    """What stands behind `content` in `text`, which continues `done` with it; 1 if an end of sequence comes first."""
    added = text[len(done) :].lstrip()
    if not text.startswith(done) or not added.startswith(content):
        raise UserError(
            where,
            None,
            "the chat template does not append this turn as it is to what it wrote before (it may drop reasoning, or "
            "write its own)",
            "remove these turns, or use a template that only appends",
        )
    rest = tokenizer.encode_text(added[len(content) :].lstrip())
    if rest and rest[0] in tokenizer.eos_ids:
        return rest, 1
    return tokenizer.encode_text(added[len(content) :]), 0
