"""Names and small files of the checkpoints of a run, and whether they are whole. Needs torch, not Megatron, so
that a resume can be refused before a process group exists.

On several nodes a shared file system may show another node's files late: whoever looks for one waits for it a while.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from sead_megatron.errors import UserError
from sead_megatron.models.converted import DCP_METADATA
from sead_megatron.models.distributed_writer import MEGATRON_COMMON, MEGATRON_FORMAT

STATE_FILE = "state.json"
FORMAT = 2
"""Of a checkpoint: 1 was Megatron's `fully_reshardable`, which does not say so."""
LATE_SECONDS = 120.0
"""How long a file may stay invisible that another node has written: NFS caches names for up to 60 s (nfs(5))."""
_LOOK_AGAIN = 0.1
# What `Trainer.state` writes and `Trainer.resume` reads, and what the checkpoint says of itself.
_STATE_KEYS = (
    *("step", "skipped_steps", "skipped_in_a_row", "schedule", "curriculum", "objective"),
    *("world_size", "optimizer_updates"),
)
_NAME = re.compile(r"^step_(\d{8})$")
_PARTIAL = ".partial"
# What loading a damaged pickle can raise (the pickle module's documentation), and damage that changes a type.
UNPICKLING_ERRORS = (
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


def partial_path(directory: Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return directory / f"{checkpoint_path(directory, step).name}{_PARTIAL}"


def remove_partials(directory: Path) -> None:
    """Removes what a killed job was writing; for one process, while no job writes."""
    for left in directory.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(left)


def wait_for_file(file: Path, size: int, seconds: float) -> None:
    """Waits until a file is there with at least `size` bytes; UserError after that many seconds."""
    deadline = time.monotonic() + seconds
    while (actual := _size_of(file)) is None or actual < size:
        if time.monotonic() >= deadline:
            seen = "missing" if actual is None else f"{actual} bytes, must have {size} by {DCP_METADATA}"
            waited = f" after {seconds:g} s" if seconds else ""
            raise damaged(file, f"{seen}{waited}")
        time.sleep(_LOOK_AGAIN)


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint; UserError when it cannot be read, lacks a part or has another format."""
    state = _read_json(path / STATE_FILE)
    if (version := state.get("format")) != FORMAT:
        raise UserError(
            f"{path / STATE_FILE}: format",
            version,
            f"must be {FORMAT}: another version of sead_megatron wrote this checkpoint",
            f"continue with that version, or {removal_remedy(path)}",
        )
    lacking = [key for key in _STATE_KEYS if key not in state]
    if lacking:
        raise damaged(path / STATE_FILE, f"lacks {', '.join(lacking)}")
    return state


def check_checkpoint(path: Path, late_seconds: float = 0.0) -> None:
    """Refuse a checkpoint with a missing, truncated or unreadable file; UserError names the file.

    Sizes and headers only: bytes that were overwritten in place are not found. `late_seconds`: how long to wait for a
    file that another node may have written.
    """
    small = (STATE_FILE, DCP_METADATA, MEGATRON_FORMAT, MEGATRON_COMMON)
    for name in small:
        wait_for_file(path / name, 0, late_seconds)
    state = read_state(path)
    _read_json(path / MEGATRON_FORMAT)
    for archive in (MEGATRON_COMMON, *(f"rng_{rank}.pt" for rank in range(state["world_size"]))):
        wait_for_file(path / archive, 0, late_seconds)
        # torch.save writes a zip archive, whose directory is at the end: what was cut off has none.
        if not zipfile.is_zipfile(path / archive):
            raise damaged(
                path / archive, f"{(path / archive).stat().st_size} bytes, truncated or overwritten"
            )
    for name, size in file_sizes(read_metadata(path)).items():
        wait_for_file(path / name, size, late_seconds)


def read_metadata(path: Path) -> Metadata:
    """Which tensors a checkpoint holds and where; UserError when that cannot be read."""
    try:
        metadata = FileSystemReader(path).read_metadata()
        metadata.storage_data.values()
    except (*UNPICKLING_ERRORS, OSError) as error:
        raise damaged(path / DCP_METADATA, f"cannot be read ({type(error).__name__})") from error
    return metadata


def file_sizes(metadata: Metadata) -> dict[str, int]:
    """File name -> bytes that the parts of tensors take in it."""
    sizes: dict[str, int] = {}
    for entry in metadata.storage_data.values():
        end = entry.offset + entry.length
        sizes[entry.relative_path] = max(end, sizes.get(entry.relative_path, 0))
    return sizes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(file, f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise damaged(file, "must hold a JSON object")
    return content


def damaged(file: Path, constraint: str) -> UserError:
    """What is wrong with a file of a checkpoint."""
    return UserError(str(file), None, constraint, removal_remedy(file.parent))


def removal_remedy(path: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    is_first = checkpoint_steps(path.parent)[:1] == [int(path.name.removeprefix("step_"))]
    return f"remove this checkpoint directory to {'start over' if is_first else 'continue from the previous one'}"
