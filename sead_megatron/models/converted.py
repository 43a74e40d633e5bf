"""Recognises a converted directory: a model as a Megatron distributed checkpoint, with config.json and tokenizer beside
it. Torch-free: it runs before anything heavy is imported.

`conversion.json` is written last, so a directory without it is not whole. It names every file of the checkpoint with
its size, which finds a file that is missing or cut short without opening it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.errors import UserError
from sead_megatron.models.config_reader import read_json_object

MARKER = "conversion.json"
DCP_METADATA = ".metadata"
FORMAT_VERSION = 1
TORCH_DIST = "torch_dist"
SAFETENSORS = "safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".distcp")
# Of a distributed checkpoint (Megatron's metadata.json says which format it has) and of a conversion.
_OF_CHECKPOINT = (DCP_METADATA, "metadata.json", MARKER)
_CONVERT_AGAIN = "convert the model again"


@dataclass(frozen=True)
class Marker:
    """The content of conversion.json."""

    layout: str
    """`torch_dist` or `safetensors`."""
    architecture: str
    config_sha256: str
    """Of the config.json that was converted."""
    dtype: str
    """Of the tensors; `mixed` where they differ."""
    tensors: int
    """Hugging Face tensors."""
    bytes: int
    """Of these tensors, without padding."""
    files: Mapping[str, int]
    """Files that hold the weights, with their sizes in bytes."""

    def write(self, directory: Path) -> None:
        """Writes the file in one go: complete or absent, also after a power cut."""
        content = {"format_version": FORMAT_VERSION, **self.__dict__}
        write_atomically(directory / MARKER, (json.dumps(content, indent=1) + "\n").encode())


def is_distributed(directory: str | Path) -> bool:
    """Whether a directory holds a distributed checkpoint, or what is left of one."""
    directory = Path(directory)
    if (directory / MARKER).is_file() and read_json_object(directory / MARKER).get("layout") == TORCH_DIST:
        return True
    return (directory / DCP_METADATA).is_file() or any(directory.glob("*.distcp"))


def check_converted(directory: str | Path) -> Marker:
    """The marker of a whole converted directory.

    Raises UserError: no completion marker, another format version, a file that is missing or has another size. Bytes
    that were overwritten in place are not found (`tools/convert_checkpoint.py --verify-only` compares them).
    """
    path = Path(directory) / MARKER
    if not path.is_file():
        raise UserError(
            str(directory),
            None,
            f"is a distributed checkpoint without {MARKER}, so not whole",
            _CONVERT_AGAIN,
        )
    content = read_json_object(path)
    if content.get("format_version") != FORMAT_VERSION:
        constraint = f"must be {FORMAT_VERSION}"
        raise UserError(f"{path}: format_version", content.get("format_version"), constraint, _CONVERT_AGAIN)
    content.pop("format_version")
    try:
        marker = Marker(**content)  # type: ignore[arg-type]
        files = {str(name): int(size) for name, size in marker.files.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(str(path), None, "lacks a part or has too much", _CONVERT_AGAIN) from error
    for name, size in files.items():
        file = Path(directory) / name
        if not file.is_file():
            raise UserError(str(file), None, f"missing; {MARKER} names it", "copy the directory again")
        if (actual := file.stat().st_size) != size:
            raise UserError(
                str(file), None, f"{actual} bytes, must have {size} by {MARKER}", "copy the directory again"
            )
    return marker


def companion_files(directory: str | Path) -> list[Path]:
    """What makes a directory self-contained: every file that is neither a weight nor about where weights lie."""
    return [
        path
        for path in sorted(Path(directory).iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHT_SUFFIXES
        and path.name not in _OF_CHECKPOINT
        and not path.name.endswith(".index.json")
    ]


def config_hash(directory: str | Path) -> str:
    """SHA-256 of config.json."""
    return hashlib.sha256((Path(directory) / "config.json").read_bytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file so that it is complete or absent whatever happens."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
