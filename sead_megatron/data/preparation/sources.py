"""Reads data sets row by row: parquet, JSONL, a directory of these, or a data set of the Hugging Face hub."""

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.data.prompts import json_object
from sead_megatron.errors import UserError

HUB = "hub:"
_SUFFIXES = (".parquet", ".jsonl")
_BATCH_ROWS = 4096
_HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """`where` names file and row for errors, `place` does so without directories of this machine, for the outputs.
    `number` counts from 1 within `file`. `content` is the row, or the error that reading it gave."""

    path: str
    file: str
    number: int
    content: dict[str, object] | UserError

    @property
    def where(self) -> str:
        return f"{self.path}, row {self.number}"

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Source:
    """Files in the order they are read, or the hub's name of a data set.

    `name` is the last part of the path: no directory of this machine gets into the provenance. `root` is the
    directory that file names are relative to.
    """

    name: str
    files: tuple[Path, ...]
    root: Path = Path()
    split: str | None = None
    config: str | None = None

    def file_name(self, path: Path) -> str:
        """One of `files`, relative to the data set's directory."""
        return path.relative_to(self.root).as_posix()

    def provenance(self) -> dict[str, object]:
        """What was read: names and the SHA-256 of each file (the hub's are read by `datasets`: none)."""
        hashes = {self.file_name(path): _sha256(path) for path in self.files}
        return {"name": self.name, "config": self.config, "split": self.split, "sha256": hashes}


def find_source(
    text: str, *, split: str | None = None, config: str | None = None, what: str = "SOURCE"
) -> Source:
    """The data set that `text` names: a file, a directory (files sorted by path), or `hub:owner/name`.

    `split` and `config` are the hub's; of a directory `split` takes the files whose names begin with it. Raises
    UserError: nothing there, a file of another kind, a split of a single file, `datasets` not installed.
    """
    if text.startswith(HUB):
        if importlib.util.find_spec("datasets") is None:
            raise UserError(
                what,
                text,
                "needs the package datasets, which is not installed",
                "pip install 'sead_megatron[hub]', or download the files and name their directory",
            )
        return Source(text, (), split=split or "train", config=config)
    if config is not None:
        raise UserError("--config", config, "is for the hub", "leave it out for files")
    path = Path(text)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in _SUFFIXES and file.name.startswith(split or "") and file.is_file()
        )
        if not files:
            begun = f" whose name begins with {split!r}" if split else ""
            raise UserError(what, text, f"holds no .parquet and no .jsonl file{begun}", "name another one")
        return Source(path.resolve().name, tuple(files), path)
    if not path.is_file():
        raise UserError(
            what,
            text,
            "no such file or directory",
            f"give a path, or {HUB}owner/name for the Hugging Face hub",
        )
    if path.suffix not in _SUFFIXES:
        raise UserError(what, text, "must end in .parquet or .jsonl", "convert the file")
    if split is not None:
        raise UserError("--split", split, "is for a directory or the hub", "leave it out for a single file")
    return Source(path.name, (path,), path.parent)


def read_rows(source: Source) -> Iterator[Row]:
    """Every row, in order. A line of JSONL that cannot be read is a row that holds the error.

    Raises UserError for a parquet file or a data set of the hub that cannot be read.
    """
    if source.name.startswith(HUB):
        yield from _hub_rows(source)
    for path in source.files:
        contents = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
        for number, content in contents:
            yield Row(str(path), source.file_name(path), number, content)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object] | UserError]]:
    """Rows are lines here; blank ones count."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield number, json_object(line, f"{path}, row {number}")
            except UserError as error:
                yield number, error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for content in batch.to_pylist():
                    number += 1
                    yield number, content
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            str(path), None, f"cannot be read as parquet ({error})", "download it again"
        ) from error


def _hub_rows(source: Source) -> Iterator[Row]:
    from datasets import load_dataset

    name = source.name.removeprefix(HUB)
    try:
        rows = load_dataset(name, source.config, split=source.split)
    except (OSError, ValueError) as error:  # no such data set, no network; no such split or configuration
        raise UserError(
            source.name, None, f"cannot be loaded ({error})", "check name, --config, --split and network"
        ) from error
    for number, content in enumerate(rows, start=1):
        yield Row(source.name, source.name, number, content)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
