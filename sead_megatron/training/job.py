"""Puts together what a rank of a run holds: world, engine, both models, optimizer, prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from sead_kernels.split_kl import describe_backend

from sead_megatron.config import TrainConfig
from sead_megatron.data.curriculum import Curriculum, build_curriculum
from sead_megatron.data.difficulty import read_difficulties
from sead_megatron.data.tokenised import benchmark_prompts, evaluation_prompts, training_prompts
from sead_megatron.data.types import Prompt
from sead_megatron.evaluation.grader import Grader
from sead_megatron.evaluation.responses import Sampler
from sead_megatron.models.export import HFStream
from sead_megatron.models.tokenizer import Tokenizer, load_tokenizer
from sead_megatron.objectives import build_objective
from sead_megatron.objectives.base import Objective
from sead_megatron.packages import check_packages
from sead_megatron.parallel import megatron_on_cpu
from sead_megatron.parallel.network import check_reachable, connect
from sead_megatron.profiling import Profile, build_profile
from sead_megatron.rollout.engine import RolloutEngine, Sampling
from sead_megatron.training.cached_responses import CachedResponses
from sead_megatron.training.models import Models, build_models
from sead_megatron.training.nonfinite import FrozenModels


@dataclass(frozen=True, eq=False)
class Job:
    """Everything a step needs."""

    config: TrainConfig
    device: torch.device
    optional_engine: RolloutEngine | None
    """None where nothing is sampled."""
    models: Models
    weights: HFStream
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    difficulties: Sequence[float] | None
    """1 - pass rate of the initial student for each training prompt, where there is such a file."""
    benchmarks: Mapping[str, Sequence[Prompt]]
    curriculum: Curriculum
    objective: Objective
    profile: Profile | None
    """The profiled steps of this rank; None when none of its steps are."""
    cache: CachedResponses | None = None
    """What is trained on in place of rollouts, where the objective reads a cache."""

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine. Raises RuntimeError in a run without one."""
        if self.optional_engine is None:
            raise RuntimeError("a run without an engine was asked to sample")
        return self.optional_engine

    @property
    def frozen(self) -> FrozenModels:
        """The frozen models as they are called in messages."""
        return FrozenModels.of(self.config, self.prompts)

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return dist.get_rank()

    def sampling(self, longest: int | None) -> Sampling:
        """How training rollouts are sampled; `longest`: a limit of the responses, by default the configuration's."""
        return rollout_sampling(self.config, self.tokenizer, longest)

    def sampler(self, grader: Grader) -> Sampler:
        """How the benchmarks of an evaluation are answered."""
        config = self.config
        sampling = Sampling(
            config.evaluation.temperature, config.evaluation_max_new_tokens, tuple(self.tokenizer.eos_ids)
        )
        return Sampler(self.engine, self.tokenizer, grader, config.evaluation.samples, sampling, config.seed)

    def sync_weights(self, version: int) -> None:
        """Gives the engine, if there is one, the student's weights (a collective over the world)."""
        if self.optional_engine is None:
            return
        self.engine.wake_for_weights()
        self.engine.load_weights(self.weights, version)
        self.engine.wake_for_rollouts()


def init_world(kind: Literal["cuda", "cpu"]) -> torch.device:
    """Joins the process group and picks this rank's device. Needs torchrun's environment."""
    if kind == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        device = torch.device("cpu")
        connect("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        connect("nccl", device)
    check_reachable(device)
    return device


def build_engine(config: TrainConfig) -> RolloutEngine:
    """The rollout engine. Before everything else: it reseeds all global generators."""
    return RolloutEngine(
        config.rollout,
        config.student.path,
        dtype=config.rollout_dtype,
        on_cpu=config.device == "cpu",
        seed=config.seed,
        scored_temperature=config.objective.temperature,
    )


def rollout_sampling(config: TrainConfig, tokenizer: Tokenizer, longest: int | None = None) -> Sampling:
    """How the configuration samples rollouts; `longest`: a limit of the responses, by default the configuration's."""
    rollout = config.rollout
    stop = tuple(tokenizer.eos_ids)
    return Sampling(
        rollout.temperature, longest or rollout.max_new_tokens, stop, rollout.top_p, rollout.top_k
    )


def build_job(config: TrainConfig, device: torch.device, report: Callable[[str], None]) -> Job:
    """Builds everything in the world of `init_world`, cheap and fallible things first.

    `report` says what is going on.
    """
    check_packages(config)  # nodes may differ, and whoever starts torchrun himself has had no preflight
    tokenizer = load_tokenizer(config.tokenizer_path)
    prompts = training_prompts(config, tokenizer)
    eval_prompts = evaluation_prompts(config, tokenizer)
    benchmarks = benchmark_prompts(config, tokenizer)
    difficulties = None
    if config.curriculum.difficulty is not None:
        by_id = read_difficulties(config.curriculum.difficulty, prompts).values
        difficulties = [by_id[prompt.id] for prompt in prompts]
    curriculum = build_curriculum(
        config.curriculum, difficulties, len(prompts), config.steps, config.data.prompts_per_step, config.seed
    )
    objective = build_objective(config.objective, config.steps)
    cache = CachedResponses(config, prompts) if config.objective.reads_cache else None
    profile = build_profile(config, dist.get_rank())
    engine = None
    if config.loads_engine:
        report("starting the rollout engine")
        engine = build_engine(config)
        report(f"rollout engine: {engine.setup.description}")
    if device.type == "cpu":
        # After the engine, which asks torch about the machine's real devices.
        megatron_on_cpu.install()
    report(f"loss kernel: {describe_backend(config.kernel.backend, device)}")
    report("loading student and teacher" if config.teachers else "loading the student")
    models = build_models(config, device, prompts)
    if profile is not None:
        profile.watch(models.student.model.module.config, *models.teachers.megatron_configs)
    torch.manual_seed(config.seed + dist.get_rank())
    weights = HFStream(models.student.model, config.rollout.sync_bucket_mib)
    return Job(
        config,
        device,
        engine,
        models,
        weights,
        tokenizer,
        prompts,
        eval_prompts,
        difficulties,
        benchmarks,
        curriculum,
        objective,
        profile,
        cache,
    )


def run_path(config: TrainConfig) -> Path:
    """The run directory."""
    return Path(config.run_dir)
