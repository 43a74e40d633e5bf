"""Do the files that the configuration names hold what a run needs? Headers and text only, no tensor is
read."""

from pathlib import Path

from sead_megatron.config.checks_objective import check_prompts_for
from sead_megatron.config.schema import TrainConfig
from sead_megatron.data.difficulty import read_difficulties
from sead_megatron.data.prompts import read_prompts
from sead_megatron.data.response_cache import read_cache
from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import read_benchmarks
from sead_megatron.models.converted import check_converted, is_distributed
from sead_megatron.models.safetensors_index import read_index
from sead_megatron.models.tokenizer_files import check_same_tokenizer

_TAKEN = "accuracy"


def check_inputs(config: TrainConfig) -> int:
    """The number of training prompts. Raises UserError for the first file that is missing or wrong."""
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        raise UserError("run_dir", config.run_dir, "exists and is not a directory", "give another path")
    _check_tokenizers(config)
    prompts = _check_prompts(config)
    reference = [] if config.reference is None else [config.reference.path]
    for directory in (config.student.path, *config.teachers, *reference):
        if is_distributed(directory):
            check_converted(directory)
        else:
            read_index(directory)
    return prompts


def _check_tokenizers(config: TrainConfig) -> None:
    if config.tokenizer is not None:
        if not Path(config.tokenizer).is_dir():
            raise UserError(
                "tokenizer", config.tokenizer, "no such directory", "give a local tokenizer directory"
            )
        check_same_tokenizer(config.tokenizer, config.student.path, "tokenizer", "student.path")
        for path, field in config.teachers.items():
            check_same_tokenizer(config.tokenizer, path, "tokenizer", field)
    for path, field in config.teachers.items():
        check_same_tokenizer(config.student.path, path, "student.path", field)
    if config.reference is not None:
        check_same_tokenizer(config.student.path, config.reference.path, "student.path", "reference.path")


def _check_prompts(config: TrainConfig) -> int:
    prompts = read_prompts(config.data.prompts)
    check_prompts_for(config, prompts)
    if config.objective.reads_cache:
        read_cache(config, prompts)
    per_step = config.data.prompts_per_step
    if per_step > len(prompts):
        raise UserError(
            "data.prompts_per_step",
            per_step,
            f"must be at most the number of prompts ({len(prompts)}), or a step repeats a prompt",
            f"use at most {len(prompts)}",
        )
    if config.curriculum.difficulty is not None:
        read_difficulties(config.curriculum.difficulty, prompts)
    if config.evaluation.prompts is not None:
        held_out = read_prompts(config.evaluation.prompts, "evaluation.prompts")
        unanswered = [prompt.id for prompt in held_out if prompt.answer is None]
        if unanswered:
            some = ", ".join(unanswered[:3]) + (", ..." if len(unanswered) > 3 else "")
            raise UserError(
                "evaluation.prompts",
                config.evaluation.prompts,
                f"{len(unanswered)} of {len(held_out)} prompts have no answer to grade by: {some}",
                "add answers or remove these prompts",
            )
    for benchmark in read_benchmarks(config.evaluation.benchmarks, "evaluation.benchmarks"):
        if benchmark.name == _TAKEN:
            raise UserError(
                "evaluation.benchmarks",
                benchmark.path,
                f"evaluation/{_TAKEN} is the metric of evaluation.prompts",
                "rename the file",
            )
    return len(prompts)
