"""OUTPUT of an evaluation: written so that a kill at any moment loses at most the batch that was being answered.

    .lock                 held by rank 0 while an evaluation runs
    evaluation.json       what was asked: the model, settings of all benchmarks, settings and checksum of each
    <benchmark>.jsonl     one object a problem, in the benchmark's order
    results.json, .md     scores, intervals and tables

Only rank 0 writes. Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import Benchmark
from sead_megatron.evaluation.graded import Graded
from sead_megatron.evaluation.settings import Settings
from sead_megatron.models.config_reader import read_json_object
from sead_megatron.records import write_atomically

FORMAT_VERSION = 1
_CHOOSE = "choose another --output, or give the options as before"
_MISSING = "(not set)"


@dataclass(frozen=True)
class Output:
    """One output directory."""

    path: Path

    @property
    def settings_path(self) -> Path:
        return self.path / "evaluation.json"

    def records_path(self, benchmark: str) -> Path:
        return self.path / f"{benchmark}.jsonl"

    def check(self, asked: Mapping[str, Any]) -> None:
        """Raises UserError when OUTPUT cannot be written or holds an evaluation that was asked for otherwise (each
        difference is named); `asked` is what `asked_for` gives. Nothing is written."""
        place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not place.is_dir():
            raise UserError("--output", str(self.path), f"{place} is not a directory", "choose another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError("--output", str(self.path), f"{place} cannot be written", "choose another")
        if not self.settings_path.exists():
            if left := [name for name in asked["benchmarks"] if self.records_path(name).exists()]:
                constraint = f"holds {left[0]}.jsonl but no evaluation.json"
                raise UserError("--output", str(self.path), constraint, "choose another")
            return
        before = self.settings()
        common = asked["benchmarks"].keys() & before["benchmarks"].keys()
        old, new = (
            _flat({**content, "benchmarks": {name: content["benchmarks"][name] for name in common}})
            for content in (before, asked)
        )
        changes = [
            f"{key} {json.dumps(old.get(key, _MISSING))} -> {json.dumps(new.get(key, _MISSING))}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, _MISSING) != new.get(key, _MISSING)
        ]
        if changes:
            constraint = f"holds an evaluation of another configuration: {', '.join(changes)}"
            raise UserError("--output", str(self.path), constraint, _CHOOSE)

    def open(self, asked: Mapping[str, Any]) -> None:
        """`check`, then take the directory for this process until it dies, and note what is asked.

        Benchmarks of earlier commands stay. Raises UserError as `check` does, and when another process has it.
        """
        self.check(asked)
        self.path.mkdir(parents=True, exist_ok=True)
        # Never closed: closing gives the lock away.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                "--output",
                str(self.path),
                "another evaluation writes to it",
                "wait for its end, or choose another",
            ) from error
        before = self.settings()["benchmarks"] if self.settings_path.exists() else {}
        content = {**asked, "benchmarks": before | asked["benchmarks"]}
        write_atomically(self.settings_path, json.dumps(content, indent=1) + "\n")

    def settings(self) -> dict[str, Any]:
        """The content of evaluation.json. Raises UserError when there is none or it is of another format."""
        if not self.settings_path.is_file():
            raise UserError(
                str(self.path),
                None,
                "holds no evaluation.json",
                "give the --output directory of an evaluation",
            )
        content: dict[str, Any] = read_json_object(self.settings_path)
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.settings_path}: format_version",
                content.get("format_version"),
                f"must be {FORMAT_VERSION}",
                "evaluate again into another --output",
            )
        return content

    def records(self, benchmark: str) -> list[Graded]:
        """The whole records of a benchmark; a last line that a kill cut short is left out.

        Raises UserError for any other line that is no record.
        """
        path = self.records_path(benchmark)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(Graded(**json.loads(line)))
            except (ValueError, TypeError) as error:
                shown = line[:60].decode(errors="replace")
                raise UserError(
                    f"{path}, line {number}",
                    shown,
                    "is not a graded problem",
                    "remove the file to start it over",
                ) from error
        return records

    def rewind(self, benchmark: Benchmark, batch: int) -> int:
        """Number of problems that are done; records of a batch that is not whole are removed.

        Batches then begin where they would have without an interruption. Raises UserError when the records are not
        those of the benchmark's first problems.
        """
        records = self.records(benchmark.name)
        ids = [problem.id for problem in benchmark.problems]
        if [record.id for record in records] != ids[: len(records)]:
            constraint = "its records are not those of the benchmark's problems"
            remedy = "remove the file to start it over"
            raise UserError(str(self.records_path(benchmark.name)), None, constraint, remedy)
        done = len(records) if len(records) == len(ids) else len(records) // batch * batch
        if self.records_path(benchmark.name).exists():
            write_atomically(
                self.records_path(benchmark.name), "".join(record.line() for record in records[:done])
            )
        return done

    def append(self, benchmark: str, records: Iterable[Graded]) -> None:
        """Adds a batch, on disk when this returns."""
        # One write: a kill cannot cut it, and what a power cut leaves of it `rewind` removes.
        with open(self.records_path(benchmark), "ab", buffering=0) as file:
            file.write("".join(record.line() for record in records).encode())
            os.fsync(file.fileno())


def asked_for(settings: Settings, companions: Path, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """What evaluation.json says: everything that decides the numbers.

    The layout, the engine's sizes and `max_model_len` do not. The model is known by its path and by names, sizes and
    times of its files.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": str(Path(settings.model).resolve()),
        "model_files": _files_digest(Path(settings.model), companions),
        **settings.shared(),
        "benchmarks": {
            benchmark.name: {
                "sha256": benchmark.sha256,
                "problems": len(benchmark.problems),
                **settings.of_benchmark(),
            }
            for benchmark in benchmarks
        },
    }


def _files_digest(*directories: Path) -> str:
    files = sorted({path for directory in directories for path in directory.iterdir() if path.is_file()})
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
