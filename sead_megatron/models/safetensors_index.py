"""Header-only index of the safetensors files of a Hugging Face directory. Torch-free: no tensor is read.

File format: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, data_offsets), the
data.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.config_reader import read_json_object

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_LOADABLE = ("BF16", "F16", "F32", "F64")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes [start, end) of `file`; `dtype` in safetensors' names (BF16, F32)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsIndex:
    """All tensors of a directory by Hugging Face name."""

    directory: Path
    tensors: Mapping[str, TensorEntry]


def read_index(directory: str | Path) -> SafetensorsIndex:
    """Index a directory that holds model.safetensors, or shards and model.safetensors.index.json.

    Raises UserError: no safetensors, a missing shard, a corrupt header, a file shorter than its header says,
    a tensor that the index names and its shard lacks.
    """
    directory = Path(directory)
    if (directory / _SINGLE).is_file():  # transformers and vLLM prefer it to an index beside it
        return SafetensorsIndex(directory, read_header(directory / _SINGLE))
    if not (directory / _INDEX).is_file():
        raise UserError(
            str(directory), None, f"holds neither {_SINGLE} nor {_INDEX}", "save the model as safetensors"
        )
    weight_map = read_json_object(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(
            f"{directory / _INDEX}: weight_map", None, "must map tensor names to files", "restore the file"
        )
    shards: dict[str, dict[str, TensorEntry]] = {}
    for file in sorted(set(weight_map.values())):
        names = [name for name, of in weight_map.items() if of == file]
        if not (directory / file).is_file():
            raise UserError(
                str(directory / file), None, f"missing; it holds {_names(names)}", "complete the download"
            )
        shards[file] = read_header(directory / file)
        lacking = [name for name in names if name not in shards[file]]
        if lacking:
            raise UserError(
                str(directory / file),
                None,
                f"lacks {_names(lacking)}, which {_INDEX} places in it",
                "complete the download",
            )
    return SafetensorsIndex(directory, {name: shards[file][name] for name, file in weight_map.items()})


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises UserError when header and file do not fit together."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or 8 + length > size or length > _LONGEST_HEADER:
            shown = "its header length" if length is None else f"a header of {length} bytes"
            raise UserError(str(path), None, f"{size} bytes, too short for {shown}", "complete the download")
        header = stream.read(length)
    try:
        entries = json.loads(header.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(str(path), None, "its header is not JSON", "download the file again") from error
    if not isinstance(entries, dict):
        raise UserError(str(path), None, "its header is not a JSON object", "download the file again")
    entries.pop("__metadata__", None)
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _entry(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorEntry:
    what = f"{path}: {name}"
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        spans = first >= 0 and last - first == expected
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(what, None, "its header entry is not readable", "download the file again") from error
    if not spans:
        raise UserError(
            what,
            [first, last],
            f"offsets must span {expected} bytes ({dtype} {list(shape)})",
            "download the file again",
        )
    if data_start + last > size:
        raise UserError(
            what, None, f"ends at byte {data_start + last}, but the file has {size}", "complete the download"
        )
    return TensorEntry(path, dtype, shape, data_start + first, data_start + last)


def check_tensors(
    index: SafetensorsIndex, expected: Mapping[str, tuple[int, ...]], is_ignored: Callable[[str], bool]
) -> None:
    """Refuse a directory whose tensors are not those of `expected` (name -> shape).

    Raises UserError for a tensor that is missing, has another shape or an unloadable type, or that nobody would
    read: a bias left out silently makes another model. Only names that `is_ignored` accepts may be left out.
    """
    missing = [name for name in expected if name not in index.tensors]
    if missing:
        raise UserError(str(index.directory), None, f"lacks {_names(missing)}", "use a complete checkpoint")
    for name, shape in expected.items():
        entry = index.tensors[name]
        if entry.shape != tuple(shape):
            raise UserError(
                f"{entry.file}: {name}",
                list(entry.shape),
                f"must have shape {list(shape)} by config.json",
                "make config.json and the weights belong together",
            )
        if entry.dtype not in _LOADABLE:
            raise UserError(
                f"{entry.file}: {name}",
                entry.dtype,
                f"must be {alternatives(_LOADABLE)}",
                "use an unquantized checkpoint",
            )
    unread = [name for name in index.tensors if name not in expected and not is_ignored(name)]
    if unread:
        raise UserError(
            str(index.directory),
            None,
            f"holds {_names(unread)}, which the architecture of config.json does not have",
            "make config.json and the weights belong together",
        )


def _names(names: list[str]) -> str:
    """The first tensor, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
