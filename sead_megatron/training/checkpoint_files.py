"""Names and small files of the checkpoints of a run, and whether they are whole. Needs torch, not Megatron, so
that a resume can be refused before a process group exists."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from sead_megatron.errors import UserError

STATE_FILE = "state.json"
# What `Trainer.state` writes and `Trainer.resume` reads.
_STATE_KEYS = ("step", "skipped_steps", "skipped_in_a_row", "schedule", "curriculum", "objective")
_NAME = re.compile(r"^step_(\d{8})$")
_METADATA = ".metadata"
# Megatron's own files beside torch's (megatron-core 0.16 to 0.19): its format, and what is no tensor shard.
_MEGATRON_FORMAT = "metadata.json"
_MEGATRON_COMMON = "common.pt"
# What loading a damaged pickle can raise (the pickle module's documentation), and damage that changes a type.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(m.group(1)) for path in directory.iterdir() if (m := _NAME.match(path.name)))


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a number of completed steps lies."""
    return directory / f"step_{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint; UserError when it cannot be read or lacks a part."""
    state = _read_json(path / STATE_FILE)
    lacking = [key for key in _STATE_KEYS if key not in state]
    if lacking:
        raise _damaged(path / STATE_FILE, f"lacks {', '.join(lacking)}")
    return state


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint with a missing, truncated or unreadable file; UserError names the file.

    Sizes and headers only: bytes that were overwritten in place are not found.
    """
    read_state(path)
    _read_json(path / _MEGATRON_FORMAT)
    for archive in (path / _MEGATRON_COMMON, *sorted(path.glob("rng_*.pt"))):
        _require(archive)
        # torch.save writes a zip archive, whose directory is at the end: what was cut off has none.
        if not zipfile.is_zipfile(archive):
            raise _damaged(archive, f"{archive.stat().st_size} bytes, truncated or overwritten")
    for name, size in _shard_sizes(path).items():
        _require(path / name)
        if (actual := (path / name).stat().st_size) < size:
            raise _damaged(path / name, f"{actual} bytes, must have {size} by {_METADATA}")


def _shard_sizes(path: Path) -> dict[str, int]:
    """File name -> bytes that the tensor shards of a torch distributed checkpoint take in it."""
    _require(path / _METADATA)
    try:
        entries = FileSystemReader(path).read_metadata().storage_data.values()
    except (*_UNPICKLING_ERRORS, OSError) as error:
        raise _damaged(path / _METADATA, f"cannot be read ({type(error).__name__})") from error
    sizes: dict[str, int] = {}
    for entry in entries:
        end = entry.offset + entry.length
        sizes[entry.relative_path] = max(end, sizes.get(entry.relative_path, 0))
    return sizes


def _read_json(file: Path) -> dict[str, Any]:
    _require(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(file, "must hold a JSON object")
    return content


def _require(file: Path) -> None:
    if not file.is_file():
        raise _damaged(file, "missing")


def _damaged(file: Path, constraint: str) -> UserError:
    return UserError(str(file), None, constraint, removal_remedy(file.parent))


def removal_remedy(path: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    is_first = checkpoint_steps(path.parent)[:1] == [int(path.name.removeprefix("step_"))]
    return f"remove this checkpoint directory to {'start over' if is_first else 'continue from the previous one'}"
