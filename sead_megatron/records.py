"""Records on disk, one JSON object a line, in files that a kill at any moment leaves readable.

JSON has no NaN or infinity. A number of a record that is not finite is written as null next to
`<name>_nonfinite`, which is "nan", "inf" or "-inf"; `read_records` turns the pair back into the float.
Inside nested values it is null only.
"""

import contextlib
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sead_megatron.errors import UserError

NONFINITE_SUFFIX = "_nonfinite"


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by one that holds `text`: a kill leaves the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    directory = os.open(
        path.parent, os.O_RDONLY
    )  # the rename itself is only durable once its directory is synced
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete records of a JSONL file, non-finite metrics restored; [] when there is no file.

    A half-written last line is left out. Raises UserError for any other line that is not an object with a
    `step`.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # What follows the last newline is empty, or the line that was being written.
    tail = lines.pop()
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if tail:
        with contextlib.suppress(UserError):
            records.append(_record(path, len(lines) + 1, tail))  # whole but for its newline
    return [_restore_nonfinite(record) for record in records]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by these records, atomically."""
    write_atomically(path, "".join(_line(record) for record in records))


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record, on disk when this returns. Raises ValueError when it has no integer `step`."""
    if not isinstance(record.get("step"), int):
        raise ValueError(f"a record of {path.name} needs an integer step, got {record.get('step')!r}")
    # One write of the whole line: a kill can only cut the file within its last line.
    with open(path, "ab", buffering=0) as file:
        file.write(_line(record).encode())
        os.fsync(file.fileno())


def truncate_records(path: Path, after_step: int) -> None:
    """Keep the whole records of steps <= `after_step`. Raises UserError as `read_records` does."""
    if not path.exists():
        return
    write_records(path, [record for record in read_records(path) if record["step"] <= after_step])


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        shown = line[:60].decode(errors="replace")
        raise UserError(
            f"{path}, line {number}", shown, "is not a record with a step", "repair or remove the line"
        )
    return record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_mark_nonfinite(record), allow_nan=False) + "\n"


def _mark_nonfinite(record: Mapping[str, Any]) -> dict[str, Any]:
    marked: dict[str, Any] = {}
    for name, value in record.items():
        marked[name] = _jsonable(value)
        if marked[name] is None and value is not None:
            marked[name + NONFINITE_SUFFIX] = str(float(value))
    return marked


def _restore_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    restored = {name: value for name, value in record.items() if not name.endswith(NONFINITE_SUFFIX)}
    for name, value in record.items():
        if name.endswith(NONFINITE_SUFFIX):
            restored[name.removesuffix(NONFINITE_SUFFIX)] = float(value)
    return restored


def _jsonable(value: Any) -> Any:
    """`value` with NumPy numbers as Python's and numbers that are not finite as None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value
