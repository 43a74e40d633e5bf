"""Text to token ids and back. Torch-free to import; transformers or sentencepiece are loaded with the
tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sead_megatron.errors import UserError
from sead_megatron.models.hf_config import read_eos_ids
from sead_megatron.models.tokenizer_files import (
    TOKENIZER_JSON,
    check_same_tokenizer,
    read_chat_template,
    require_tokenizer,
)

__all__ = ["HFTokenizer", "Tokenizer", "check_same_tokenizer", "load_tokenizer", "plain_prompt"]


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's own, then those of config.json and
        generation_config.json."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's padded `vocab_size` may be larger."""
        ...

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer starts (chat template with generation
        prompt)."""
        ...

    def render(self, messages: Sequence[dict[str, str]]) -> str | None:
        """Text of a conversation by the chat template, generation prompt included; None without a template."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text by itself: nothing is added to it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        ...


def load_tokenizer(path: str | Path, what: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a directory: tokenizer.json through transformers, or else tokenizer.model through
    sentencepiece.

    Raises UserError when the directory has neither, or an unreadable one.
    """
    if require_tokenizer(path, what).name == TOKENIZER_JSON:
        return HFTokenizer(path)
    from sead_megatron.models.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def plain_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The prompt of a model without chat template: the contents, joined by newlines."""
    return "\n".join(message["content"] for message in messages)


def merge_eos_ids(own: int | None, directory: str | Path) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence id, then those that the model's files name."""
    first = () if own is None else (own,)
    return first + tuple(token for token in read_eos_ids(directory) if token not in first)


class HFTokenizer:
    """tokenizer.json, read by transformers' AutoTokenizer; the chat template comes from the same
    directory."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            # Any: transformers' tokenizer classes are not typed.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                str(path), None, f"transformers cannot read its tokenizer ({error})", "restore it"
            ) from error
        self._path = path
        self._has_template = read_chat_template(path) is not None
        self.eos_ids = merge_eos_ids(self._tokenizer.eos_token_id, path)
        self.vocab_size = len(self._tokenizer)

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """See `Tokenizer`. Without a chat template: `plain_prompt`, with the special tokens of a plain
        text."""
        text = self.render(messages)
        if text is None:
            return list(self._tokenizer.encode(plain_prompt(messages)))
        # The template writes its own BOS; encoding must not add a second one.
        return self.encode_text(text)

    def render(self, messages: Sequence[dict[str, str]]) -> str | None:
        """See `Tokenizer`."""
        if not self._has_template:
            return None
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False
                )
            )
        except TemplateError as error:
            raise UserError(
                f"{self._path}: chat template", None, str(error), "change the messages"
            ) from error

    def encode_text(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
