"""Estimate the difficulty of a run's training prompts: 1 - pass rate of the untrained student.

    python tools/estimate_difficulty.py CONFIG OUT.jsonl --nproc-per-node 8
    python tools/estimate_difficulty.py CONFIG OUT.jsonl student.path=models/other --samples 16

CONFIG is that of the run; student, tokenizer, prompts, sampling and seed are taken from it, and `curriculum.difficulty`
need not exist yet. Rollouts come from the engine that training uses, with a seed for every prompt and sample. An
estimate that was killed goes on when the same command is given again, on any number of ranks. On several nodes call
`torchrun ... tools/estimate_difficulty.py CONFIG OUT.jsonl` yourself. See docs/grading.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sead_megatron.config import CurriculumConfig, TrainConfig, load_config
from sead_megatron.config.checks_fields import check_fields
from sead_megatron.config.checks_layout import check_engine
from sead_megatron.data.prompts import PromptRecord, read_prompts
from sead_megatron.errors import UserError
from sead_megatron.evaluation.difficulty_file import DifficultyFile, describe
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.rollout.environment import prepare_environment

USER_ERROR = 2
# Keeps these seeds apart from those of training, whose keys are (seed, step, index).
_SEED_STREAM = 0x0D1FF


def checked(options: argparse.Namespace, world_size: int) -> tuple[TrainConfig, DifficultyFile]:
    """The configuration and the file of an estimate that can start. Raises UserError."""
    config = load_config(options.config, options.overrides)
    # Needs difficulties by default, which are about to be estimated.
    config = config.model_copy(update={"curriculum": CurriculumConfig(name="uniform")})
    check_fields(config)
    check_engine(
        config.rollout.tensor_parallel, read_hf_config(config.student.path, "student.path"), world_size
    )
    records = read_prompts(config.data.prompts)
    _check_answers(config, records)
    provenance = describe(config, records, options.samples)
    return config, DifficultyFile(options.out, provenance, [record.id for record in records])


def _check_answers(config: TrainConfig, records: Sequence[PromptRecord]) -> None:
    unanswered = [record.id for record in records if record.answer is None]
    if unanswered:
        some = ", ".join(unanswered[:3]) + (", ..." if len(unanswered) > 3 else "")
        raise UserError(
            "data.prompts",
            config.data.prompts,
            f"{len(unanswered)} of {len(records)} prompts have no answer to grade by: {some}",
            "add answers or remove these prompts",
        )


def launch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Checks everything that one process can, then becomes torchrun."""
    config, file = checked(options, options.nproc_per_node)
    count = len(read_prompts(config.data.prompts))
    if (done := file.check()) == count:
        print(f"{options.out} is complete: {count} prompts")
        return 0
    # Imports torch.
    from sead_megatron.data.tokenised import training_prompts
    from sead_megatron.models.tokenizer import load_tokenizer
    from sead_megatron.preflight import check_weights

    check_weights(config.student.path, read_hf_config(config.student.path, "student.path"))
    training_prompts(config, load_tokenizer(config.tokenizer_path))
    if done:
        print(f"{options.out}: going on after {done} of {count} prompts", flush=True)
    prepare_environment(on_cpu=config.device == "cpu")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.nproc_per_node}"]
    os.execv(sys.executable, [sys.executable, *torchrun, __file__, *arguments])


def estimate(config: TrainConfig, file: DifficultyFile, samples: int, per_call: int) -> None:
    """One rank of the estimate (a collective over torchrun's world)."""
    import torch.distributed as dist

    from sead_megatron.data.tokenised import training_prompts
    from sead_megatron.evaluation.grader import Grader
    from sead_megatron.evaluation.greedy import pass_flags
    from sead_megatron.models.tokenizer import load_tokenizer
    from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
    from sead_megatron.rollout.collect import generate_everywhere, request_seed
    from sead_megatron.training.job import build_engine, init_world, rollout_sampling

    head = int(os.environ["RANK"]) == 0
    tokenizer = load_tokenizer(config.tokenizer_path)
    prompts = training_prompts(config, tokenizer)
    sampling = rollout_sampling(config, tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Grader() as grader, Progress(*columns, console=Console(stderr=True), disable=not head) as progress:
        init_world(config.device)
        taken_up = [file.take_up(per_call) if head else 0]
        dist.broadcast_object_list(taken_up)
        engine = build_engine(config)
        engine.wake_for_weights()
        engine.load_weights(CheckpointWeights(config.student.path), 0)
        engine.wake_for_rollouts()
        task = progress.add_task("prompts", total=len(prompts), completed=taken_up[0])
        for start in range(taken_up[0], len(prompts), per_call):
            batch = range(start, min(start + per_call, len(prompts)))
            keys = [(i, sample) for i in batch for sample in range(samples)]
            seeds = [request_seed(config.seed, _SEED_STREAM, *key) for key in keys]
            asked = [prompts[i] for i, _ in keys]
            generations = generate_everywhere(engine, [p.token_ids for p in asked], seeds, sampling)
            passed = pass_flags(asked, [g.token_ids for g in generations], tokenizer, grader)
            if head:
                rates = [
                    sum(map(bool, passed[at : at + samples])) / samples for at in range(0, len(keys), samples)
                ]
                file.append([(prompts[i].id, 1 - rate) for i, rate in zip(batch, rates, strict=True)])
            progress.update(task, completed=batch.stop)
        timeouts, crashes = grader.take_counts()
    if timeouts or crashes:
        print(
            f"rank {dist.get_rank()}: {timeouts + crashes} answers could not be graded and are wrong",
            file=sys.stderr,
        )
    engine.close()
    dist.barrier()
    dist.destroy_process_group()


def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Ends a rank that failed without destructors, which wait for peers that wait for this rank."""
    user = isinstance(error, UserError)
    if not user:
        traceback.print_exception(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(USER_ERROR if user else 1)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML configuration of the run")
    parser.add_argument("out", type=Path, metavar="OUT", help="difficulty file to write or to continue")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--samples", type=_positive, default=8, metavar="K", help="rollouts a prompt (default 8)"
    )
    parser.add_argument(
        "--prompts-per-call",
        type=_positive,
        default=64,
        metavar="N",
        help="prompts between two writes (default 64)",
    )
    parser.add_argument("--nproc-per-node", type=_positive, default=1, metavar="N", help="ranks to start")
    options = parser.parse_intermixed_args(arguments)
    if "RANK" not in os.environ:
        try:
            return launch(options, arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
    sys.excepthook = leave
    config, file = checked(options, int(os.environ["WORLD_SIZE"]))
    prepare_environment(on_cpu=config.device == "cpu")
    estimate(config, file, options.samples, options.prompts_per_call)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
