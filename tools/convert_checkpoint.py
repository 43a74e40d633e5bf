"""Convert a Hugging Face directory to a Megatron distributed checkpoint, or back.

    python tools/convert_checkpoint.py HF_DIR OUT_DIR --verify
    python tools/convert_checkpoint.py CONVERTED_DIR OUT_DIR --shard-gb 2
    python tools/convert_checkpoint.py runs/first/checkpoints/step_00000181 OUT_DIR --model models/student

Which way is told by SOURCE. The output is self-contained (config.json, tokenizer and all else that is no weight are
copied), and `student.path` and `teacher.path` take either kind. One process, memory for a few chunks of 32 MiB. A
conversion that was killed goes on when the same command is given again. See docs/conversion.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from sead_megatron.errors import UserError
from sead_megatron.models.convert import DTYPE_CHOICES, GB, Conversion, Options, convert, plan_conversion
from sead_megatron.models.convert_verify import verify
from sead_megatron.models.partial_directory import gigabytes


def name_map(plan: Conversion) -> Table:
    """A row for each Megatron parameter: its Hugging Face tensors, shapes, type and layout."""
    table = Table("Hugging Face", "shape", "Megatron", "stored shape", "dtype", "layout")
    for parameter in plan.parameters:
        tensors = plan.hf_tensors(parameter)
        table.add_row(
            "\n".join(tensor.name for tensor in tensors),
            "\n".join(_shape(tensor.shape) for tensor in tensors),
            parameter.name,
            _shape(parameter.global_shape),
            str(plan.dtype(parameter)).removeprefix("torch."),
            type(parameter.layout).__name__,
        )
    return table


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def sizes(plan: Conversion) -> str:
    """What would be written."""
    return (
        f"{plan.source} -> {plan.target} ({plan.layout}): {len(plan.dtypes)} tensors, "
        f"{gigabytes(plan.tensor_bytes)} in {len(plan.files)} files, the largest tensor "
        f"{gigabytes(plan.largest_tensor_bytes)}; needs {gigabytes(plan.needed_bytes)} of disk"
    )


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says. Raises UserError."""
    if not arguments.shard_gb > 0:
        raise UserError("--shard-gb", arguments.shard_gb, "must be positive", "use for example 5")
    options = Options(
        dtype=DTYPE_CHOICES[arguments.dtype] if arguments.dtype else None,
        shard_bytes=int(arguments.shard_gb * GB),
        overwrite=arguments.overwrite,
        model=arguments.model,
    )
    plan = plan_conversion(arguments.source, arguments.out, options, writes=not arguments.verify_only)
    if arguments.dry_run:
        # As wide as its contents where nobody looks at a terminal.
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(name_map(plan))
        print(sizes(plan))
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:

        def task(description: str) -> "Advance":
            return Advance(progress, description, plan.tensor_bytes)

        def check(directory: Path) -> None:
            if arguments.verify or arguments.verify_only:
                verify(plan, directory, task("comparing"))

        if arguments.verify_only:
            check(plan.target)
        else:
            convert(plan, task("converting"), check)
    print(sizes(plan) if not arguments.verify_only else f"{plan.target} equals {plan.source} bit by bit")


class Advance:
    """Moves one bar."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def __call__(self, size: int) -> None:
        self._progress.advance(self._task, size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--dtype", choices=list(DTYPE_CHOICES), help="cast all tensors; default: each keeps its type"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of the files, GB (default 5)")
    parser.add_argument("--verify", action="store_true", help="compare the output with SOURCE bit by bit")
    parser.add_argument("--verify-only", action="store_true", help="compare an OUT that was written before")
    parser.add_argument("--dry-run", action="store_true", help="print the name map and sizes, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    parser.add_argument(
        "--model", type=Path, help="where config.json and tokenizer of a run's checkpoint come from"
    )
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
