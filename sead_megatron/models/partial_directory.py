"""A directory that is written file by file beside its final name, and goes on after a kill. Torch-free.

Each finished file leaves a note; what has none is written again. The directory gets its name when all is done.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sead_megatron.errors import UserError
from sead_megatron.models.config_reader import read_json_object
from sead_megatron.models.converted import MARKER, sync, write_atomically

_NOTES = ".unfinished"
_PLAN = "plan.json"
_LOCK = "lock"


class PartialDirectory:
    """`target`.partial."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self._notes = self.path / _NOTES
        self._lock: IO[str] | None = None

    def check(self, plan: Mapping[str, object]) -> None:
        """Refuse to go on with another conversion than the one that was cut off."""
        if not self.path.exists():
            return
        begun = read_json_object(self._notes / _PLAN) if (self._notes / _PLAN).is_file() else {}
        different = [key for key in plan if begun.get(key) != plan[key]]
        if different:
            raise UserError(
                str(self.path),
                None,
                f"is left of another conversion (other {', '.join(different)})",
                "remove it, or give --overwrite to start over",
            )

    def open(self, plan: Mapping[str, object]) -> None:
        """Begins, or goes on after `check`. UserError while another process is at it."""
        self._notes.mkdir(parents=True, exist_ok=True)
        self._lock = (self._notes / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            constraint = "is being written by another process"
            raise UserError(str(self.path), None, constraint, "wait for it, or end it") from error
        write_atomically(self._notes / _PLAN, (json.dumps(plan, indent=1) + "\n").encode())

    def remove(self) -> None:
        """Forget what was begun."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def finished(self, name: str) -> bytes | None:
        """The note of a finished file; None where the file is to be written."""
        note = self._notes / name
        if not note.is_file():
            return None
        size, _, content = note.read_bytes().partition(b"\n")
        file = self.path / name
        return content if file.is_file() and file.stat().st_size == int(size) else None

    def finish(self, name: str, content: bytes = b"") -> None:
        """Notes that a file is whole and on disk; `content` comes back from `finished`."""
        size = (self.path / name).stat().st_size
        write_atomically(self._notes / name, b"%d\n" % size + content)

    def commit(self) -> None:
        """Gives the directory its name; what stood there goes."""
        for file in self.path.iterdir():
            sync(file)
        sync(self.path)
        if self.target.exists():
            shutil.rmtree(self.target)
        self.path.rename(self.target)
        sync(self.target.parent)
        # Last, so that a kill before the renaming leaves something to go on with.
        shutil.rmtree(self.target / _NOTES)

    def close(self) -> None:
        """Lets another process go on."""
        if self._lock is not None:
            self._lock.close()


def check_output(target: Path, source: Path, *, overwrite: bool) -> None:
    """Raises UserError for an output that exists, that is or holds the source, or that is no model to overwrite."""
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise UserError("OUT", str(target), "is the source or holds it", "give another directory")
    if not target.exists():
        return
    if not overwrite:
        raise UserError("OUT", str(target), "exists", "give another directory, or --overwrite")
    is_model = (target / "config.json").is_file() or (target / MARKER).is_file()
    is_directory = target.is_dir() and not target.is_symlink()
    if not is_directory or (not is_model and any(target.iterdir())):
        raise UserError("OUT", str(target), "is no model that could be overwritten", "give another directory")


def check_disk_space(target: Path, needed: int) -> None:
    """Raises UserError when fewer than `needed` bytes are free where `target` will be."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            "OUT",
            str(target),
            f"needs {gigabytes(needed)}, and {place} has {gigabytes(free)} free",
            "free some space, or give another directory",
        )


def gigabytes(size: int) -> str:
    """`5300000000` -> `5.3 GB`; small sizes in smaller units."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
