"""Make a prompt file of a data set: map its columns, remove duplicates and benchmark problems, write JSONL.

    python tools/prepare_data.py dapo-math-17k.parquet data/train.jsonl --benchmark AIME24.parquet MATH-500.parquet
    python tools/prepare_data.py hub:openai/gsm8k data/train.jsonl --config main --split train --instruction boxed
    python tools/prepare_data.py problems/ data/train.jsonl --prompt-column text --answer-column label

See docs/data.md for layouts, rules and what they do to DAPO-Math-17k.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from sead_megatron.data.preparation.contamination import Rule
from sead_megatron.data.preparation.instructions import CHOICES
from sead_megatron.data.preparation.layouts import DETECTED, AssistantTurn
from sead_megatron.data.preparation.prepare import Advance, Options, outputs, prepare, write
from sead_megatron.data.preparation.sources import find_source
from sead_megatron.data.preparation.summary import table
from sead_megatron.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("command line", None, message, "run `python tools/prepare_data.py --help`")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = _Parser(description=__doc__.splitlines()[0])
    options.add_argument("source", help=".parquet, .jsonl, a directory of these, or hub:owner/name")
    options.add_argument("out", type=Path, help="JSONL to write")
    options.add_argument("--benchmark", nargs="+", action="extend", default=[], metavar="SOURCE",
                         help="remove what these ask")  # fmt: skip
    options.add_argument("--config", help="configuration of a data set of the hub")
    options.add_argument("--split", help="of the hub (default train); of a directory the files that begin so")
    for role, names in DETECTED.items():
        options.add_argument(
            f"--{role}-column", metavar="NAME", help=f"default: the first of {', '.join(names)}"
        )
    options.add_argument("--domain", help="domain of every row")
    options.add_argument("--instruction", choices=CHOICES, default="keep",
                         help="keep prompts, take known instructions off, or put our own there")  # fmt: skip
    options.add_argument("--assistant-turn", choices=get_args(AssistantTurn), default="refuse",
                         help="what a last message of the assistant is")  # fmt: skip
    options.add_argument("--near-duplicates", type=_share, default=Options.near_duplicates, metavar="SIMILARITY",
                         help="Jaccard, of near duplicates (default %(default)s); 0: equal ones only")  # fmt: skip
    options.add_argument("--conflicts", choices=("drop", "first"), default="drop",
                         help="equal problems with different answers: drop all, or keep the first")  # fmt: skip
    options.add_argument("--ngram", type=_positive, default=Rule.ngram, help="tokens (default %(default)s)")
    options.add_argument("--coverage", type=_share, default=Rule.coverage,
                         help="part of a question that shared n-grams cover (default %(default)s)")  # fmt: skip
    options.add_argument("--numbers", type=_share, default=Rule.numbers,
                         help="part of a question's numbers that must be there (default %(default)s)")  # fmt: skip
    options.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed rows out and count them"
    )
    options.add_argument("--overwrite", action="store_true", help="replace OUT")
    return options


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says. Raises UserError."""
    source = find_source(arguments.source, split=arguments.split, config=arguments.config)
    benchmarks = [find_source(text, what="--benchmark") for text in arguments.benchmark]
    _check_names([benchmark.name for benchmark in benchmarks])
    _check_out(
        arguments.out, [*source.files, *(file for b in benchmarks for file in b.files)], arguments.overwrite
    )
    options = Options(
        columns={role: getattr(arguments, f"{role}_column") for role in DETECTED},
        domain=arguments.domain,
        instruction=arguments.instruction,
        assistant_turn=arguments.assistant_turn,
        skip_malformed=arguments.skip_malformed,
        near_duplicates=arguments.near_duplicates,
        keep_conflicts=arguments.conflicts == "first",
        contamination=Rule(arguments.ngram, arguments.coverage, arguments.numbers),
    )
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def stage(description: str, rows: int | None) -> Advance:
            stop_clocks()
            task = progress.add_task(description, total=rows)
            return lambda: progress.advance(task)

        def stop_clocks() -> None:
            for task in progress.tasks:
                progress.update(task.id, total=task.completed)

        preparation = prepare(source, benchmarks, options, stage)
        stop_clocks()
    write(preparation, arguments.out)
    Console(width=None if sys.stdout.isatty() else 160).print(table(preparation.provenance))


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError("--benchmark", twice, "is the name of two of them", "rename one: counts go by name")


def _check_out(out: Path, read: Sequence[Path], overwrite: bool) -> None:
    sources = {file.resolve() for file in read}
    for path in outputs(out):
        if path.resolve() in sources:
            raise UserError("OUT", str(path), "is read as well", "give another name")
        if path.is_dir():
            raise UserError("OUT", str(path), "is a directory", "give the name of a file")
        if path.exists() and not overwrite:
            raise UserError("OUT", str(path), "exists", "give another name, or --overwrite")


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or 2 for a mistake."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
