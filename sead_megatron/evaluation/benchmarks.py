"""Reads benchmarks: JSONL as prompt files are, or parquet with verl's columns. Torch-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_megatron.data.prompts import read_prompts
from sead_megatron.errors import UserError

_SUFFIXES = (".jsonl", ".parquet")
_LAYOUT = "prompt (a list of role and content), reward_model.ground_truth and extra_info.index"


@dataclass(frozen=True)
class Problem:
    """One problem and the answer that it is graded by."""

    id: str
    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """The problems of one file, in its order."""

    name: str
    """The file's name without suffix."""
    path: str
    sha256: str
    """Of the file."""
    problems: tuple[Problem, ...]


def read_benchmark(path: str | Path, what: str = "--benchmarks") -> Benchmark:
    """Reads one file; `what` names the option or field in errors.

    JSONL: `id`, `messages` or `prompt`, `answer` (`data.prompts.read_prompts`). Parquet: `prompt`,
    `reward_model.ground_truth`, `extra_info.index`, as verl prepares data; other columns beside these are ignored.
    Raises UserError: no file, another suffix, other columns, no problem, a problem without messages or answer, an id
    twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(what, str(path), "no such file", "give the path of a JSONL or parquet file")
    if path.suffix not in _SUFFIXES:
        raise UserError(what, str(path), "must end in .jsonl or .parquet", "convert the file to one of them")
    problems = _jsonl(path, what) if path.suffix == ".jsonl" else _parquet(path, what)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Benchmark(path.stem, str(path), digest, tuple(problems))


def read_benchmarks(paths: list[str], what: str = "--benchmarks") -> list[Benchmark]:
    """`read_benchmark` of each. Raises UserError also for two files of one name: it names what is written."""
    benchmarks: dict[str, Benchmark] = {}
    for path in paths:
        benchmark = read_benchmark(path, what)
        if benchmark.name in benchmarks:
            raise UserError(
                what,
                path,
                f"has the name of {benchmarks[benchmark.name].path}: results go to {benchmark.name}.jsonl",
                "give each file a name of its own",
            )
        benchmarks[benchmark.name] = benchmark
    return list(benchmarks.values())


def _jsonl(path: Path, what: str) -> list[Problem]:
    records = read_prompts(path, what)
    unanswered = [record.id for record in records if not (record.answer or "").strip()]
    if unanswered:
        some = ", ".join(unanswered[:3]) + (", ..." if len(unanswered) > 3 else "")
        raise UserError(
            what,
            str(path),
            f"{len(unanswered)} of {len(records)} problems have no answer to grade by: {some}",
            "add answers or remove these problems",
        )
    return [Problem(record.id, record.messages, record.answer or "") for record in records]


def _parquet(path: Path, what: str) -> list[Problem]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        _check_columns(path, schema, what)
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(
            path, columns=["prompt", "reward_model", "extra_info"]
        ).to_pylist()
    except (pyarrow.lib.ArrowInvalid, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            what, str(path), f"cannot be read as parquet ({reason})", "restore the file"
        ) from error
    if not rows:
        raise UserError(what, str(path), "holds no problem", "give a file with one problem a row")
    rows_of: dict[str, int] = {}
    problems = []
    for number, row in enumerate(rows):
        problem = _problem(row, f"{path}, row {number}")
        if problem.id in rows_of:
            raise UserError(
                f"{path}, row {number}: extra_info.index",
                problem.id,
                f"already used in row {rows_of[problem.id]}",
                "make indices unique",
            )
        rows_of[problem.id] = number
        problems.append(problem)
    return problems


def _check_columns(path: Path, schema: Any, what: str) -> None:
    """The three columns with their types; what is found instead is said as parquet has it."""
    import pyarrow.types as kinds

    def inner(column: str, key: str) -> Any:
        if column not in schema.names or not kinds.is_struct(schema.field(column).type):
            return None
        struct = schema.field(column).type
        index = struct.get_field_index(key)
        return struct.field(index).type if index >= 0 else None

    def is_text(kind: Any) -> bool:
        return kind is not None and (kinds.is_string(kind) or kinds.is_large_string(kind))

    names: set[str] = set()
    if "prompt" in schema.names:
        prompt: Any = schema.field("prompt").type
        if (kinds.is_list(prompt) or kinds.is_large_list(prompt)) and kinds.is_struct(prompt.value_type):
            names = {field.name for field in prompt.value_type}
    index = inner("extra_info", "index")
    fits = (
        names >= {"role", "content"}
        and is_text(inner("reward_model", "ground_truth"))
        and (is_text(index) or (index is not None and kinds.is_integer(index)))
    )
    if not fits:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            what,
            str(path),
            f"its columns must hold {_LAYOUT}; found {found}",
            "rename the columns, or write JSONL with id, messages and answer",
        )


def _problem(row: dict[str, Any], where: str) -> Problem:
    index = (row["extra_info"] or {}).get("index")
    if index is None or index == "":
        raise UserError(f"{where}: extra_info.index", index, "must not be empty", "number the rows")
    answer = (row["reward_model"] or {}).get("ground_truth")
    if answer is None or not answer.strip():
        raise UserError(f"{where}: reward_model.ground_truth", answer, "must not be empty", "add the answer")
    messages = [{"role": m["role"], "content": m["content"]} for m in row["prompt"] or [] if m]
    if not messages or not all(isinstance(text, str) for m in messages for text in m.values()):
        raise UserError(
            f"{where}: prompt", row["prompt"], "must be messages with role and content", "correct the row"
        )
    return Problem(str(index), messages, answer)
