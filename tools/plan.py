"""Memory of every rank and time of a step, before anything runs.

    python tools/plan.py examples/nemotron_8b_49b/config.yaml --world-size 32 --gpu h100
    python tools/plan.py CONFIG --world-size 32 --gpu h100 --search        # the fastest layouts that fit
    python tools/plan.py CONFIG student.parallel.tensor=8 --world-size 32 --gpu h200 --format markdown

Reads the configuration and both models' config.json; weights are not needed. Exit code 2: it does not fit.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from sead_megatron.config import check_models, load_config
from sead_megatron.errors import UserError
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.plan.devices import DEVICES
from sead_megatron.plan.fit import check_fit
from sead_megatron.plan.lengths import Lengths, read_lengths
from sead_megatron.plan.memory import Run, plan_memory
from sead_megatron.plan.report import Plan, as_json, markdown, print_plan, render, render_candidates
from sead_megatron.plan.search import search
from sead_megatron.plan.timing import Assumptions, estimate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("command line", None, message, "run `python tools/plan.py --help`")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line; every assumption of the time estimate is an option."""
    options = _Parser(description=__doc__.splitlines()[0])
    options.add_argument("config", help="YAML configuration")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    options.add_argument("--world-size", type=_positive, required=True, metavar="N", help="ranks")
    options.add_argument("--gpu", choices=sorted(DEVICES), default="h100")
    options.add_argument(
        "--search", action="store_true", help="propose layouts for student, teacher and engine"
    )
    options.add_argument(
        "--no-fp8-rollouts", action="store_true", help="search only the configured rollout precision"
    )
    options.add_argument("--count", type=_positive, default=8, help="proposals of a search")
    options.add_argument("--format", choices=("table", "markdown", "json"), default="table")
    options.add_argument("--lengths", metavar="FILE", help="measured response lengths, one integer a line")
    options.add_argument(
        "--length-median", type=_positive_float, default=4000.0, help="of log-normal lengths"
    )
    options.add_argument("--length-sigma", type=_positive_float, default=0.8, help="of their logarithm")
    for field in fields(Assumptions):
        kind = _positive if isinstance(field.default, int) else _positive_float
        options.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return options


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or 2 for a mistake or a run that does not fit."""
    try:
        return _plan(parser().parse_intermixed_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    device = DEVICES[options.gpu]
    longest = config.rollout.max_new_tokens
    lengths = Lengths(options.length_median, options.length_sigma, longest)
    if options.lengths is not None:
        lengths = read_lengths(options.lengths, longest)
    assumptions = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    if options.search:
        if not config.teachers:
            raise UserError(
                "--search",
                None,
                f"objective {config.objective.name} loads no teacher, whose layouts are searched",
                "leave it out",
            )
        student = read_hf_config(config.student.path, "student.path")
        teachers = tuple(read_hf_config(path, field) for path, field in config.teachers.items())
        reference = None
        if config.reference is not None:
            reference = read_hf_config(config.reference.path, "reference.path")
        run = Run(config, student, teachers, options.world_size, device, reference)
        found = search(
            run, lengths, assumptions, count=options.count, fp8_rollouts=not options.no_fp8_rollouts
        )
        if not found:
            raise UserError(
                "--search",
                f"{options.world_size} x {device.name}",
                "no layout of both models and an engine fits",
                "use more ranks, FP8 for the teacher, or a smaller batch.max_tokens_per_microbatch",
            )
        print_plan(render_candidates(found))
        return 0
    models = check_models(config, options.world_size)
    teachers = tuple(models.teachers.values())
    run = Run(config, models.student, teachers, options.world_size, device, models.reference)
    plan = Plan(run, plan_memory(run), estimate(run, lengths, assumptions), lengths, assumptions)
    if options.format == "json":
        print(json.dumps(as_json(plan), indent=1))
    elif options.format == "markdown":
        print(markdown(plan))
    else:
        print_plan(render(plan))
    check_fit(plan.memory, device.memory_bytes, device.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
