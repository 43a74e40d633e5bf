"""The checks that need torch, a tokenizer or the machine: the last stage before processes start.

`sead_megatron.config.check_config` comes first and reads text and headers. Neither Megatron nor vLLM is imported
here: the launcher finds a mistake in seconds, and says it once instead of once a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sead_kernels.split_kl import backend_name
from transformers.utils import logging as transformers_logging

from sead_megatron.config import TrainConfig
from sead_megatron.data.tokenised import benchmark_prompts, evaluation_prompts, training_prompts
from sead_megatron.data.types import Prompt
from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.converted import check_converted, is_distributed
from sead_megatron.models.family import WeightMap, is_ignored
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.safetensors_index import check_tensors, read_index
from sead_megatron.models.stored_tensors import find_parameters, read_metadata
from sead_megatron.models.tokenizer import load_tokenizer
from sead_megatron.packages import check_packages
from sead_megatron.records import read_records
from sead_megatron.resources import check_disk, check_memory
from sead_megatron.rollout.environment import check_environment
from sead_megatron.run_directory import RunDirectory
from sead_megatron.training.cached_responses import CachedResponses
from sead_megatron.training.checkpoint_files import (
    LATE_SECONDS,
    check_checkpoint,
    checkpoint_path,
    checkpoint_steps,
)


def preflight(
    config: TrainConfig,
    local_world_size: int = 1,
    world_size: int | None = None,
    *,
    several_nodes: bool = False,
) -> None:
    """Check machine, memory, disk, run directory, weights and prompts of a run that `check_config` accepted.

    `local_world_size`: processes that will start on this machine; `world_size`: in all, by default as many.
    `several_nodes`: other machines may have written files that this one does not show yet.
    Builds the loss kernels where they are not cached yet and writes nothing else. Raises UserError for the first
    thing that is wrong.
    """
    _check_machine(config, local_world_size)
    student = read_hf_config(config.student.path)
    teachers = {path: read_hf_config(path) for path in config.teachers}
    reference = None if config.reference is None else read_hf_config(config.reference.path)
    world = world_size or local_world_size
    check_memory(config, student, tuple(teachers.values()), world, local_world_size, reference=reference)
    _check_run(config, several_nodes=several_nodes)
    check_disk(config, student)
    check_weights(config.student.path, student)
    for path, teacher in teachers.items():
        check_weights(path, teacher)
    if config.reference is not None and reference is not None:
        check_weights(config.reference.path, reference)
    _check_prompts(config, min(model.vocab_size for model in (student, *teachers.values())))


def _check_machine(config: TrainConfig, local_world_size: int) -> None:
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device", "cuda", "no GPU is visible to torch", "use device: cpu")
        if local_world_size > (gpus := torch.cuda.device_count()):
            raise UserError(
                "--nproc-per-node",
                local_world_size,
                f"must be at most the visible GPUs ({gpus})",
                f"use {gpus}",
            )
    if config.loads_engine:
        check_environment()
    check_packages(config)
    # Before the ranks start: one process builds what all of them load.
    try:
        backend_name(config.kernel.backend, torch.device(config.device))
    except ValueError as error:
        raise UserError(
            "kernel.backend", config.kernel.backend, str(error), "install it, or use auto"
        ) from error


def _check_run(config: TrainConfig, *, several_nodes: bool) -> None:
    run = RunDirectory.check(config)
    for records in (run.metrics_path, run.evaluations_path):
        read_records(records)
    steps = checkpoint_steps(run.checkpoints_path)
    if steps:
        late = LATE_SECONDS if several_nodes else 0.0
        check_checkpoint(checkpoint_path(run.checkpoints_path, steps[-1]), late)


def check_weights(directory: str, config: HFConfig) -> None:
    """UserError unless a directory holds all weights of the model, and nothing else of a model."""
    if is_distributed(directory):
        check_converted(directory)
        find_parameters(directory, config, read_metadata(directory))
        return
    expected = WeightMap(FAMILIES[config.architecture], config).hf_shapes()
    check_tensors(read_index(directory), expected, lambda name: is_ignored(config, name))


def _check_prompts(config: TrainConfig, vocab_size: int) -> None:
    # transformers warns of every text that is longer than the tokenizer's own limit; ours is the one that holds.
    transformers_logging.set_verbosity_error()
    tokenizer = load_tokenizer(config.tokenizer_path)
    prompts = training_prompts(config, tokenizer)
    _check_ids("data.prompts", prompts, vocab_size)
    if config.objective.reads_cache:
        CachedResponses(config, prompts)
    _check_ids("evaluation.prompts", evaluation_prompts(config, tokenizer), vocab_size)
    for problems in benchmark_prompts(config, tokenizer).values():
        _check_ids("evaluation.benchmarks", problems, vocab_size)


def _check_ids(what: str, prompts: Sequence[Prompt], vocab_size: int) -> None:
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= vocab_size:
            raise UserError(
                what,
                prompt.id,
                f"has the token id {largest}, but the models' vocab_size is {vocab_size}",
                "use the tokenizer that belongs to the models",
            )
