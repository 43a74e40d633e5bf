"""Reads difficulty files: 1 - pass rate of the initial student, estimated once before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.data.prompts import AnyPrompt, entry_id, prompt_set_hash, read_jsonl
from sead_megatron.errors import UserError

PROMPT_SET = "prompts_sha256"
"""Key of the provenance that holds the hash of the prompts (`prompt_set_hash`)."""


@dataclass(frozen=True)
class Difficulties:
    """`values`: prompt id -> difficulty in [0, 1], 0 the easiest. `provenance`: how they were estimated, if
    told."""

    values: dict[str, float]
    provenance: dict[str, object] | None


def read_difficulties(
    path: str | Path, prompts: Sequence[AnyPrompt], what: str = "curriculum.difficulty"
) -> Difficulties:
    """Read JSONL of `{"id", "difficulty"}`; the first line may be `{"provenance": {...}}` instead.

    Ids beyond those of `prompts` are allowed, unless the provenance says for which prompts it was estimated. Raises
    UserError: no file, a malformed line, a difficulty outside [0, 1], an id twice, a prompt without a difficulty,
    other prompts than those of the provenance.
    """
    values: dict[str, float] = {}
    provenance: dict[str, object] | None = None
    first = True
    for number, entry in read_jsonl(path, what):
        where = f"{path}, line {number}"
        if first and set(entry) == {"provenance"}:
            told = entry["provenance"]
            if not isinstance(told, dict):
                raise UserError(f"{where}: provenance", told, "must be a JSON object", "correct it")
            if PROMPT_SET in told and told[PROMPT_SET] != prompt_set_hash(prompts):
                raise UserError(
                    what,
                    str(path),
                    f"was estimated for other prompts ({PROMPT_SET} of its first line is not that of the prompt file)",
                    "estimate again, or remove the first line to use it all the same",
                )
            provenance, first = told, False
            continue
        first = False
        prompt_id = entry_id(entry, where)
        value = entry.get("difficulty")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            constraint = "must be a number from 0 to 1" if "difficulty" in entry else "missing"
            raise UserError(f"{where}: difficulty", value, constraint, "write 1 - pass rate")
        if prompt_id in values:
            raise UserError(f"{where}: id", prompt_id, "already has a difficulty", "make ids unique")
        values[prompt_id] = float(value)
    missed = [prompt.id for prompt in prompts if prompt.id not in values]
    if missed:
        raise UserError(
            what,
            str(path),
            f"has no difficulty for {len(missed)} of {len(prompts)} prompts: {', '.join(missed[:3])}"
            + (", ..." if len(missed) > 3 else ""),
            "estimate the difficulty of the same prompt file",
        )
    return Difficulties(values, provenance)
