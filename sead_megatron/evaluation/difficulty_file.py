"""A difficulty file while it is written: the provenance line, then prompts in the order of the prompt file.

It only grows, so that a kill at any moment leaves a file that the same command continues; the reader of a run refuses
one that is not whole (`data.difficulty`). Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sead_megatron.config import TrainConfig
from sead_megatron.data.difficulty import PROMPT_SET
from sead_megatron.data.prompts import AnyPrompt, prompt_set_hash
from sead_megatron.errors import UserError
from sead_megatron.models.identity import model_identity
from sead_megatron.records import write_atomically


def describe(config: TrainConfig, prompts: Sequence[AnyPrompt], samples: int) -> dict[str, Any]:
    """The provenance: everything that decides the pass rates, but for the values of the weights."""
    rollout = config.rollout
    grading = Path(__file__).with_name("grading.py")
    return {
        "model": config.student.path,
        **model_identity(config.student.path),
        "sampling": {
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "max_new_tokens": rollout.max_new_tokens,
            "dtype": config.rollout_dtype,
            "quantization": rollout.quantization,
        },
        "samples": samples,
        "seed": config.seed,
        "grader": {
            "math_verify": version("math-verify"),
            "grading_sha256": hashlib.sha256(grading.read_bytes()).hexdigest(),
        },
        PROMPT_SET: prompt_set_hash(prompts),
    }


class DifficultyFile:
    """The file of one estimate."""

    def __init__(self, path: Path, provenance: Mapping[str, Any], prompt_ids: Sequence[str]) -> None:
        self._path = path
        self._provenance = dict(provenance)
        self._ids = list(prompt_ids)

    def check(self) -> int:
        """How many prompts are finished; writes nothing.

        Raises UserError for a file of something else, of another estimate, or with a line that is not the next
        prompt's, and where the file could not be written.
        """
        if not self._path.exists():
            self._check_writable()
            return 0
        return max(0, len(self._ends()) - 1)

    def take_up(self, per_call: int) -> int:
        """Starts the file, or cuts it after the last whole batch of `per_call` prompts; how many prompts it holds.

        Whole batches only: which requests an engine computes together can change the last bits of its logits.
        """
        ends = self._ends() if self._path.exists() else []
        if not ends:
            write_atomically(self._path, json.dumps({"provenance": self._provenance}) + "\n")
            return 0
        done = len(ends) - 1
        if done < len(self._ids):
            done -= done % per_call
        os.truncate(self._path, ends[done])
        return done

    def append(self, difficulties: Sequence[tuple[str, float]]) -> None:
        """Adds prompts, on disk when this returns."""
        text = "".join(json.dumps({"id": name, "difficulty": value}) + "\n" for name, value in difficulties)
        with open(self._path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())

    def _check_writable(self) -> None:
        parent = self._path.resolve().parent
        if not parent.is_dir():
            raise UserError("OUT", str(self._path), "its directory does not exist", "create it")
        if not os.access(parent, os.W_OK):
            raise UserError("OUT", str(self._path), "its directory cannot be written", "choose another")

    def _ends(self) -> list[int]:
        """Where each whole line ends, bytes; the first is the provenance. What a kill left of a line does not count."""
        content = self._path.read_bytes()
        # The first line is written in one go: what has only a part of a line is another file.
        if content and b"\n" not in content:
            self._check_provenance(f"{self._path}, line 1", None)
        lines = content.split(b"\n")[:-1]
        ends: list[int] = []
        for number, line in enumerate(lines):
            where = f"{self._path}, line {number + 1}"
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if number == 0:
                self._check_provenance(where, entry)
            elif (
                number > len(self._ids)
                or not isinstance(entry, dict)
                or entry.get("id") != self._ids[number - 1]
            ):
                raise UserError(
                    where, None, "is not the next prompt's difficulty", "choose another OUT, or remove it"
                )
            ends.append(len(line) + 1 + (ends[-1] if ends else 0))
        return ends

    def _check_provenance(self, where: str, entry: object) -> None:
        told = entry.get("provenance") if isinstance(entry, dict) else None
        if not isinstance(told, dict):
            raise UserError(where, None, "is not the first line of an estimate", "choose another OUT")
        if told != self._provenance:
            keys = sorted(told.keys() | self._provenance.keys())
            differing = [key for key in keys if told.get(key) != self._provenance.get(key)]
            raise UserError(
                where,
                None,
                f"belongs to another estimate: {', '.join(differing)} differ",
                "choose another OUT, or remove it to estimate again",
            )
