"""Reads difficulty files: 1 - pass rate of the initial student, estimated once before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.data.prompts import entry_id, read_jsonl
from sead_megatron.errors import UserError


@dataclass(frozen=True)
class Difficulties:
    """`values`: prompt id -> difficulty in [0, 1], 0 the easiest. `provenance`: how they were estimated, if
    told."""

    values: dict[str, float]
    provenance: dict[str, object] | None


def read_difficulties(
    path: str | Path, prompt_ids: Sequence[str], what: str = "curriculum.difficulty"
) -> Difficulties:
    """Read JSONL of `{"id", "difficulty"}`; the first line may be `{"provenance": {...}}` instead.

    Ids beyond `prompt_ids` are allowed. Raises UserError: no file, a malformed line, a difficulty outside [0,
    1], an id twice, a prompt without a difficulty.
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
    missed = [prompt_id for prompt_id in prompt_ids if prompt_id not in values]
    if missed:
        raise UserError(
            what,
            str(path),
            f"has no difficulty for {len(missed)} of {len(prompt_ids)} prompts: {', '.join(missed[:3])}"
            + (", ..." if len(missed) > 3 else ""),
            "estimate the difficulty of the same prompt file",
        )
    return Difficulties(values, provenance)
