"""tokenizer.model through the sentencepiece library, chat template through jinja2; transformers is not
involved."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import sentencepiece
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import merge_eos_ids, plain_prompt
from sead_megatron.models.tokenizer_files import (
    SENTENCEPIECE_MODEL,
    added_tokens,
    read_chat_template,
    read_tokenizer_config,
)


class SentencePieceTokenizer:
    """A directory with tokenizer.model and, optionally, tokenizer_config.json and chat_template.jinja.

    Special tokens (control pieces such as `<s>`, added tokens of tokenizer_config.json) that a chat template
    writes become their single id. The text between them is encoded piece by piece as the reference Llama-2
    code does: each stretch as a text of its own, with the model's leading-space rule applied to it.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path) / SENTENCEPIECE_MODEL
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(str(file), None, "not a SentencePiece model", "restore the file") from error
        settings = read_tokenizer_config(path)
        pieces = self._model.get_piece_size()
        self._special = {self._model.id_to_piece(i): i for i in range(pieces) if self._model.is_control(i)}
        self._special |= {text: token for token, text in added_tokens(path).items()}
        self._special_text = {token: text for text, token in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._bos = self._named_token(settings, "bos_token", self._model.bos_id())
        self._eos = self._named_token(settings, "eos_token", self._model.eos_id())
        self._add_bos = settings.get("add_bos_token", True) is not False
        self._template = _compile(read_chat_template(path), path)
        self._path = path
        self.eos_ids = merge_eos_ids(self._eos, path)
        self.vocab_size = max(pieces, max(self._special_text, default=-1) + 1)

    def _named_token(self, settings: dict[str, object], key: str, fallback: int) -> int | None:
        """The id of `bos_token` / `eos_token` of tokenizer_config.json, else the model's own; None when it
        has none."""
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text in self._special:
            return self._special[text]
        return fallback if fallback >= 0 else None

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """See `Tokenizer`. Without a chat template: `plain_prompt` after BOS (unless `add_bos_token` is
        false)."""
        text = self.render(messages)
        if text is None:
            ids = list(self._model.encode(plain_prompt(messages)))
            return [self._bos, *ids] if self._bos is not None and self._add_bos else ids
        return self.encode_text(text)

    def render(self, messages: Sequence[dict[str, str]]) -> str | None:
        """See `Tokenizer`."""
        if self._template is None:
            return None
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=self._special_text.get(self._bos, "") if self._bos is not None else "",
                eos_token=self._special_text.get(self._eos, "") if self._eos is not None else "",
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self._path}: chat template", None, str(error), "change the messages"
            ) from error

    def encode_text(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = []
        for part in self._split.split(text) if self._split is not None else [text]:
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        pieces = self._model.get_piece_size()
        return str(self._model.decode([int(i) for i in ids if i < pieces and i not in self._special_text]))


def _compile(template: str | None, path: str | Path) -> jinja2.Template | None:
    """The environment that chat templates are written for: transformers' own settings and functions."""
    if template is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        where = f"{path}: chat template, line {error.lineno}"
        raise UserError(where, None, f"not valid jinja ({error.message})", "correct the template") from error


def _to_json(value: object, indent: int | None = None) -> str:
    """jinja's own tojson escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
