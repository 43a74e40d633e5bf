"""`python -m sead_megatron train CONFIG`; `check`, `dry-run`, `cache` of a CONFIG; `evaluate MODEL`; `report RUN_DIR`.

This file is the process boundary: the only place that catches errors it did not expect.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from sead_megatron import __version__
from sead_megatron.config import TrainConfig, check_config, load_config
from sead_megatron.errors import UserError, alternatives
from sead_megatron.rollout.environment import prepare_environment

if TYPE_CHECKING:
    from sead_megatron.evaluation.checks import Evaluation

_Work = TypeVar("_Work", TrainConfig, "Evaluation")
"""What the ranks of a subcommand are given."""

USER_ERROR = 2
_HELP = "run `python -m sead_megatron --help`"
_MULTI_NODE_OPTIONS = (
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
)


class _Parser(argparse.ArgumentParser):
    """Reports its errors like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", None, message, f"run `{self.prog} --help`")


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; the exit code. A user's mistake is one line on stderr and exit code 2."""
    try:
        return _command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _command(arguments: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "check": _check,
        "dry-run": _dry_run,
        "cache": _cache,
        "report": _report,
        "evaluate": _evaluate,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__.split(chr(10))[0]}\n\nEach has --help.")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in commands:
        raise UserError("command", arguments[0], f"must be {alternatives(list(commands))}", _HELP)
    return commands[arguments[0]](arguments[1:])


def _parser(command: str, description: str) -> _Parser:
    parser = _Parser(prog=f"python -m sead_megatron {command}", description=description)
    parser.add_argument("config", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example student.parallel.tensor=2"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _check(arguments: Sequence[str]) -> int:
    parser = _parser("check", "Check a configuration and its input files as for a run of N processes.")
    parser.add_argument("--world-size", type=_positive, required=True, metavar="N")
    options = parser.parse_intermixed_args(arguments)
    config, summary = _load_and_check(options, options.world_size)
    # The nodes of that world are not known.
    _preflight(config, local_world_size=1, world_size=options.world_size)
    print(summary)
    return 0


def _dry_run(arguments: Sequence[str]) -> int:
    parser = _parser("dry-run", "Build layouts, rank mapping and models without weights, on one CPU process.")
    parser.add_argument("--world-size", type=_positive, required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=_positive, default=8, metavar="N")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    prepare_environment(on_cpu=True)
    from sead_megatron.dry_run import print_dry_run

    print_dry_run(config, options.world_size, options.ranks_per_node)
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="python -m sead_megatron report", description="Write an HTML page about runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default for one run: RUN_DIR/report.html"
    )
    options = parser.parse_intermixed_args(arguments)
    from sead_megatron.report import write_report

    print(write_report(options.run_dirs, options.output))
    return 0


def _load_and_check(options: argparse.Namespace, world_size: int) -> tuple[TrainConfig, str]:
    """The configuration, and its summary."""
    config = load_config(options.config, options.overrides)
    return config, check_config(config, world_size).summary(config.curriculum.name)


def _preflight(
    config: TrainConfig, local_world_size: int, world_size: int, *, several_nodes: bool = False
) -> None:
    # Imports torch: only after everything that can be found without.
    from sead_megatron.packages import describe_layers
    from sead_megatron.preflight import preflight

    preflight(config, local_world_size, world_size, several_nodes=several_nodes)
    if config.device == "cuda":
        print(describe_layers(config))


def _train(arguments: Sequence[str]) -> int:
    parser = _parser("train", "Train. Outside torchrun, starts torchrun with --nproc-per-node processes.")
    _add_torchrun_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if "RANK" in os.environ:
        return _rank(lambda world_size: _load_and_check(options, world_size)[0], _train_loop)
    world_size = options.nproc_per_node * (options.nnodes or 1)
    config, summary = _load_and_check(options, world_size)
    _preflight(config, options.nproc_per_node, world_size, several_nodes=(options.nnodes or 1) > 1)
    print(f"{summary}\nrun directory {config.run_dir}", flush=True)
    # Inherited by torchrun and its ranks; torchrun warns when OMP_NUM_THREADS is not set.
    prepare_environment(on_cpu=config.device == "cpu")
    os.execv(sys.executable, _torchrun(options, ["train", options.config, *options.overrides]))


def _train_loop(config: TrainConfig) -> None:
    from sead_megatron import train

    train.main(config)


def _cache(arguments: Sequence[str]) -> int:
    parser = _parser(
        "cache", "Sample and score responses once, into data.cache. Outside torchrun, starts torchrun."
    )
    _add_torchrun_options(parser)
    options = parser.parse_intermixed_args(arguments)
    from sead_megatron.data.response_cache import cache_writer, scoring_config

    def load(world_size: int) -> TrainConfig:
        config = scoring_config(load_config(options.config, options.overrides))
        check_config(config, world_size)
        return config

    if "RANK" in os.environ:
        return _rank(load, _cache_loop)
    world_size = options.nproc_per_node * (options.nnodes or 1)
    config = load(world_size)
    if cache_writer(config).is_complete:
        print(f"{config.run_dir} is complete")
        return 0
    _preflight(config, options.nproc_per_node, world_size)
    prepare_environment(on_cpu=config.device == "cpu")
    os.execv(sys.executable, _torchrun(options, ["cache", options.config, *options.overrides]))


def _cache_loop(config: TrainConfig) -> None:
    from sead_megatron.training import make_cache

    make_cache.main(config)


def _evaluate(arguments: Sequence[str]) -> int:
    from sead_megatron.evaluation.settings import add_arguments, is_comparison, settings_of

    parser = _Parser(
        prog="python -m sead_megatron evaluate",
        description="Pass rates of a model on benchmarks. Outside torchrun, starts torchrun.",
    )
    add_arguments(parser)
    _add_torchrun_options(parser)
    options = parser.parse_args(arguments)
    if is_comparison(options):
        from sead_megatron.evaluation.tables import compare_outputs, show

        show(compare_outputs(options.compare, options.output))
        return 0
    from sead_megatron.evaluation.checks import check, preflight

    settings = settings_of(options)
    if "RANK" in os.environ:
        return _rank(lambda world_size: check(settings, world_size), _evaluation_loop)
    preflight(
        check(settings, options.nproc_per_node * (options.nnodes or 1)),
        options.nproc_per_node,
    )
    prepare_environment(on_cpu=settings.device == "cpu")
    os.execv(sys.executable, _torchrun(options, ["evaluate", *arguments]))


def _evaluation_loop(evaluation: "Evaluation") -> None:
    from sead_megatron.evaluation import evaluate

    evaluate.main(evaluation)


def _add_torchrun_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=_positive, default=1, metavar="N")
    parser.add_argument(
        "--nnodes", type=_positive, metavar="N", help="this and the following go to torchrun as they are"
    )
    for option in _MULTI_NODE_OPTIONS[1:]:
        parser.add_argument(f"--{option.replace('_', '-')}")


def _torchrun(options: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """The command that becomes this process. One node needs no address: --standalone picks a free port."""
    several_nodes = {
        name: getattr(options, name) for name in _MULTI_NODE_OPTIONS if getattr(options, name) is not None
    }
    rendezvous = [f"--{name.replace('_', '-')}={value}" for name, value in several_nodes.items()]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(rendezvous or ["--standalone"]),
        f"--nproc-per-node={options.nproc_per_node}",
        *("-m", "sead_megatron", *command),
    ]


def _rank(load: Callable[[int], _Work], run: Callable[[_Work], None]) -> int:
    """One rank of the torchrun world: `load` checks what is asked of a world of that size, `run` does it.

    A rank that fails leaves without running destructors: those of process groups and engines wait for peers
    that wait for this rank. torchrun sees the exit code and ends the whole job.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        work = load(int(os.environ["WORLD_SIZE"]))
    except UserError as error:  # the same on every rank: one of them says it
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    prepare_environment(on_cpu=work.device == "cpu")
    try:
        run(work)
    except UserError as error:  # maybe on this rank only
        print(f"error: {error}" if speaks else f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        _leave(USER_ERROR)
    except KeyboardInterrupt:
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(1)
    return 0


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command_line() -> int:
    """The console script `sead-megatron`."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command_line())
