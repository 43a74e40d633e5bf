"""Fixed responses of several turns: which tokens follow a prompt, and which of them the assistant writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import Tokenizer

Message = dict[str, str]


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], turns: Sequence[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Ids of what follows the rendered `messages`, up to the end of the last turn, and which are the assistant's.

    `turns` begin and end with the assistant. Its tokens are those that it would sample: from behind the generation
    prompt to the end of sequence; what the template writes between turns is not among them. Every part is encoded by
    itself, as prompts and responses are in rollouts.

    Raises UserError, naming `where`, without a chat template, and with one that changes earlier turns.
    """
    done, conversation = tokenizer.render(messages), list(messages)
    if done is None:
        raise UserError(f"{where}: turns", None, "need a chat template", "use a solution, or add a template")
    ids: list[int] = []
    own: list[bool] = []
    for is_assistant, part, is_last in _parts(turns):
        conversation += part
        text = tokenizer.render(conversation, generation_prompt=not is_assistant) or ""
        if not text.startswith(done):
            raise UserError(
                f"{where}: turns",
                part[0]["role"],
                "the chat template changes earlier turns when this one follows (it may drop their reasoning)",
                "remove these turns, or use a template that only appends",
            )
        added = tokenizer.encode_text(text[len(done) :])
        sampled = _sampled(added, tokenizer.eos_ids) if is_assistant else 0
        if is_last:
            added = added[:sampled]
            if not added or added[-1] not in tokenizer.eos_ids:
                added += tokenizer.eos_ids[:1]
            sampled = len(added)
        ids += added
        own += [True] * sampled + [False] * (len(added) - sampled)
        done = text
    return ids, own


def _parts(turns: Sequence[Message]) -> Iterator[tuple[bool, list[Message], bool]]:
    """(is the assistant's, messages, is the last one): templates may write several results of tools as one message."""
    groups = [(own, list(part)) for own, part in groupby(turns, key=lambda turn: turn["role"] == "assistant")]
    for index, (own, part) in enumerate(groups):
        yield own, part, index == len(groups) - 1


def _sampled(ids: Sequence[int], eos_ids: Sequence[int]) -> int:
    """Tokens up to the first end of sequence, all of them without one."""
    return next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
