"""The whole preparation: rows to examples, what is removed and why, what is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sead_megatron import __version__
from sead_megatron.data.preparation.contamination import Match, Rule, find_contaminated
from sead_megatron.data.preparation.duplicates import Duplicates, Problem, answers_differ, find_duplicates
from sead_megatron.data.preparation.instructions import unwrap, with_instruction
from sead_megatron.data.preparation.layouts import (
    AssistantTurn,
    Columns,
    Example,
    detect_columns,
    read_example,
)
from sead_megatron.data.preparation.sources import Source, read_rows
from sead_megatron.data.preparation.summary import statistics
from sead_megatron.data.preparation.text import canonical_tokens
from sead_megatron.errors import UserError
from sead_megatron.records import write_atomically

REASONS = ("malformed", "contaminated", "conflicting answers", "duplicate", "near duplicate")
Advance = Callable[[], object]
Stage = Callable[[str, int | None], Advance]
"""Begins a stage of the work, of so many rows if that is known; what it returns is called once a row."""


@dataclass(frozen=True)
class Options:
    """What to do. `columns` and `domain` are the user's choices; what is None is found out or left out."""

    columns: dict[str, str | None] = field(default_factory=dict)
    domain: str | None = None
    instruction: str = "keep"
    assistant_turn: AssistantTurn = "refuse"
    skip_malformed: bool = False
    near_duplicates: float = 0.5
    keep_conflicts: bool = False
    contamination: Rule = field(default_factory=Rule)


@dataclass(frozen=True)
class Entry:
    """An example of a data set. `where` is for errors, `place` (no directories) for outputs; `id` is its own or made
    of its place, which does not change when other rows are removed."""

    where: str
    place: str
    id: str
    example: Example
    text: str
    problem: Problem


@dataclass(frozen=True)
class Removal:
    """A row that is left out. `of`: the row or the benchmark's question that it equals, `similarity`: Jaccard of
    duplicates, coverage of contamination (None: contaminated through a duplicate)."""

    place: str
    id: str | None
    reason: str
    of: str | None = None
    similarity: float | None = None
    problem: str | None = None
    of_problem: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Preparation:
    """`rows` are the lines of the output in order, `removed` the others in order; `lookalikes` are kept."""

    rows: list[dict[str, Any]]
    removed: list[Removal]
    lookalikes: list[Removal]
    provenance: dict[str, Any]


def problem_text(messages: Sequence[dict[str, str]]) -> str:
    """What is compared: all turns but the system's, those of the user without known wrappers."""
    return "\n".join(
        (unwrap(message["content"])[0] if message["role"] == "user" else message["content"]).strip()
        for message in messages
        if message["role"] != "system"
    )


def prepare(source: Source, benchmarks: Sequence[Source], options: Options, stage: Stage) -> Preparation:
    """Read `source`, remove what equals a question of `benchmarks` or an earlier row. Writes nothing.

    Contamination goes before all else: a row that is a duplicate of a contaminated one is contaminated. Raises
    UserError: a malformed row (unless skipped), an id twice among the rows that stay, no row left.
    """
    entries, malformed = _read(source, options, stage("reading", None))
    problems = [entry.problem for entry in entries]
    distinct = len({problem.tokens for problem in problems})
    duplicates = find_duplicates(problems, options.near_duplicates, stage("comparing", distinct))
    questions = [
        (benchmark.name, entry)
        for benchmark in benchmarks
        for entry in _read(benchmark, Options(), stage(f"reading {benchmark.name}", None))[0]
    ]
    leaders = duplicates.leaders(len(entries))
    contaminated = _contaminated(problems, leaders, [entry for _, entry in questions], options.contamination)
    removed = _duplicate_removals(entries, duplicates, options.keep_conflicts)
    removed |= _contamination_removals(entries, leaders, contaminated, questions)
    kept = [entry for index, entry in enumerate(entries) if index not in removed]
    rows = _output_rows(source, kept, options)
    lookalikes = [
        _removal(entries, near.second, "other answer", near.first, near.similarity)
        for near in duplicates.lookalikes
        if near.first not in removed and near.second not in removed
    ]
    left_out = malformed + [removed[index] for index in sorted(removed)]
    reasons = Counter(removal.reason for removal in left_out)
    asked = Counter(name for name, _ in questions)
    found = Counter(questions[number][0] for number in {match.question for match in contaminated.values()})
    provenance: dict[str, Any] = {
        "sead_megatron": __version__,
        "source": source.provenance(),
        "benchmarks": [benchmark.provenance() for benchmark in benchmarks],
        "options": asdict(options),
        "counts": {
            "rows": len(entries) + len(malformed),
            "removed": {reason: reasons[reason] for reason in REASONS},
            "written": len(rows),
            "lookalikes kept": len(lookalikes),
            "questions": {b.name: {"asked": asked[b.name], "found": found[b.name]} for b in benchmarks},
        },
        "statistics": statistics(rows, [entry.text for entry in kept]),
    }
    return Preparation(rows, left_out, lookalikes, provenance)


def write(preparation: Preparation, out: Path) -> None:
    """`out`, and beside it `.provenance.json`, `.removed.jsonl` and `.lookalikes.jsonl`; `out` comes last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    removed, lookalikes, provenance = outputs(out)[1:]
    write_atomically(removed, _jsonl([asdict(removal) for removal in preparation.removed]))
    write_atomically(lookalikes, _jsonl([asdict(pair) for pair in preparation.lookalikes]))
    write_atomically(provenance, json.dumps(preparation.provenance, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, _jsonl(preparation.rows))


def outputs(out: Path) -> list[Path]:
    """All files that `write` writes."""
    endings = ("", ".removed.jsonl", ".lookalikes.jsonl", ".provenance.json")
    return [out.with_name(out.name + ending) for ending in endings]


def _read(source: Source, options: Options, advance: Advance) -> tuple[list[Entry], list[Removal]]:
    entries: list[Entry] = []
    malformed: list[Removal] = []
    columns: Columns | None = None
    for row in read_rows(source):
        advance()
        try:
            if isinstance(row.content, UserError):
                raise row.content
            columns = columns or detect_columns(row.content, row.where, options.columns)
            example = read_example(row.content, row.where, columns, assistant_turn=options.assistant_turn)
        except UserError as error:
            # Without columns it is not the row that is wrong.
            if not options.skip_malformed or (columns is None and error is not row.content):
                raise
            said = str(error).replace(row.where, row.place)
            malformed.append(Removal(row.place, None, "malformed", error=said))
            continue
        # Of a conversation all that is asked; its last answer is not compared, as a solution is not.
        text = problem_text([*example.messages, *(example.turns or ())[:-1]])
        row_id = example.id or f"{PurePosixPath(row.file).stem}-{row.number}"
        problem = Problem(canonical_tokens(text), example.answer)
        entries.append(Entry(row.where, row.place, row_id, example, text, problem))
    if not entries:
        raise UserError(source.name, None, "holds no row that can be used", "name another data set")
    return entries, malformed


def _contaminated(
    problems: Sequence[Problem], leaders: Sequence[int], questions: Sequence[Entry], rule: Rule
) -> dict[int, Match]:
    """Index of each row that is a benchmark's question -> the question; those that are so by a duplicate are not in."""
    same: dict[tuple[str, ...], list[int]] = {}
    for index, problem in enumerate(problems):
        same.setdefault(problem.tokens, []).append(index)
    groups = [leaders[indices[0]] for indices in same.values()]
    matches = find_contaminated(list(same), groups, [entry.problem.tokens for entry in questions], rule)
    indices_of = list(same.values())
    return {index: match for number, match in matches.items() for index in indices_of[number]}


def _duplicate_removals(
    entries: Sequence[Entry], duplicates: Duplicates, keep_conflicts: bool
) -> dict[int, Removal]:
    """Index of each row that goes -> why."""
    removed: dict[int, Removal] = {}
    for group in duplicates.same:
        conflict = not keep_conflicts and answers_differ([entries[index].example.answer for index in group])
        reason = "conflicting answers" if conflict else "duplicate"
        for index in group if conflict else group[1:]:
            other = group[0] if index != group[0] else group[1]
            removed[index] = _removal(entries, index, reason, other, 1.0)
    for near in duplicates.near:
        removed[near.second] = _removal(entries, near.second, "near duplicate", near.first, near.similarity)
    return removed


def _contamination_removals(
    entries: Sequence[Entry],
    leaders: Sequence[int],
    contaminated: dict[int, Match],
    questions: Sequence[tuple[str, Entry]],
) -> dict[int, Removal]:
    """Contaminated rows and all duplicates of them."""
    through: dict[int, Match] = {}
    for index in sorted(contaminated):
        through.setdefault(leaders[index], contaminated[index])
    removed: dict[int, Removal] = {}
    for index, entry in enumerate(entries):
        direct = contaminated.get(index)
        match = direct or through.get(leaders[index])
        if match is not None:
            name, question = questions[match.question]
            removed[index] = Removal(
                entry.place,
                entry.id,
                "contaminated",
                f"{name}: {question.id}",
                direct.coverage if direct else None,
                entry.text,
                question.text,
            )
    return removed


def _removal(entries: Sequence[Entry], index: int, reason: str, other: int, similarity: float) -> Removal:
    entry, of = entries[index], entries[other]
    return Removal(entry.place, entry.id, reason, of.id, similarity, entry.text, of.text)


def _output_rows(source: Source, entries: Sequence[Entry], options: Options) -> list[dict[str, Any]]:
    rows = []
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.id in seen:
            raise UserError(
                f"{entry.where}: id",
                entry.id,
                f"is also that of {seen[entry.id]}, which asks something else",
                "name another --id-column, or correct the ids",
            )
        seen[entry.id] = entry.place
        row: dict[str, Any] = {
            "id": entry.id,
            "messages": with_instruction(entry.example.messages, options.instruction),
            "answer": entry.example.answer,
            "domain": options.domain or entry.example.domain,
            "solution": entry.example.solution,
            "turns": entry.example.turns,
        }
        rows.append({key: value for key, value in row.items() if value is not None})
    if not rows:
        raise UserError(
            source.name, None, "has no row left", "look at what the benchmarks took, or name another"
        )
    return rows


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
