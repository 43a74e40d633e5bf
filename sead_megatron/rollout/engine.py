"""The in-process vLLM engine: one per rank, tensor-parallel over neighbouring ranks, fed with weights every step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from vllm import LLM, SamplingParams

from sead_megatron.config import RolloutConfig
from sead_megatron.parallel.groups import group_of_this_rank
from sead_megatron.parallel.layout import Layout
from sead_megatron.rollout import vllm_patches
from sead_megatron.rollout.engine_setup import engine_options, inspect_setup
from sead_megatron.rollout.tap_recorder import (
    ENTROPY,
    LSE,
    LSE_SAMPLED,
    LSE_SCORED,
    RECORDER,
    REQUEST_KEY,
    TappedRows,
)


@dataclass(frozen=True)
class Sampling:
    """How to sample one call's requests. `temperature` 0 is greedy."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Generation:
    """One sampled response. Arrays have one entry a sampled token, the stop token included."""

    token_ids: np.ndarray
    sampling_logprobs: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    finished: bool


class WeightSource(Protocol):
    """Full Hugging Face tensors, each in storage of its own."""

    @property
    def names(self) -> set[str]:
        """What a complete stream holds."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, tensor), in the same order on every rank."""


class RolloutEngine:
    """vLLM inside this process (`external_launcher`), over the trainer's own world.

    Create it after `init_process_group` and before anything that depends on global random state: `LLM()` reseeds
    python, numpy and torch.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_directory: str | Path,
        *,
        dtype: str,
        on_cpu: bool,
        seed: int,
        scored_temperature: float,
    ) -> None:
        self._on_cpu = on_cpu
        self._scored_temperature = scored_temperature
        self.layout = Layout(tensor=config.tensor_parallel, pipeline=1, world=dist.get_world_size())
        self._rank = dist.get_rank()
        self._tp_group = group_of_this_rank(self.layout.tensor_groups())
        self.weight_version = -1
        if on_cpu:
            # MASTER_PORT and the launcher's process are equal on all ranks of a job and unique to it.
            job = f"sead{os.environ.get('MASTER_PORT', '0')}-{os.getppid()}-"
            vllm_patches.unique_shared_memory_names(job, is_cleaner=os.environ.get("LOCAL_RANK", "0") == "0")
        vllm_patches.know_nemotron_nas()
        options = engine_options(
            config,
            model_directory,
            dtype=dtype,
            on_cpu=on_cpu,
            seed=seed + self.layout.dp_rank(self._rank),
        )
        self.setup = inspect_setup(options)
        self._llm = LLM(**options, logits_processors=[self.setup.tap])
        vllm_patches.keep_trainer_world()

    @property
    def replica(self) -> int:
        """Which engine of the world this rank belongs to."""
        return self.layout.dp_rank(self._rank)

    @property
    def num_replicas(self) -> int:
        """How many engines share the prompts."""
        return self.layout.data

    @property
    def is_replica_head(self) -> bool:
        """True on the one rank of each engine whose results are collected."""
        return self.layout.tp_rank(self._rank) == 0

    def load_weights(self, weights: WeightSource, version: int) -> None:
        """Replaces all weights by the stream's and drops cached prefixes.

        Raises RuntimeError when the stream is incomplete: vLLM only warns about a missing tensor and would go on
        with the old one. Any error in here leaves the engine broken and must end the job.
        """
        seen: set[str] = set()

        def recorded() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                seen.add(name)
                yield name, tensor

        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": recorded()})
        expected = weights.names
        if seen != expected:
            raise RuntimeError(
                f"weight sync to version {version} is incomplete: "
                f"missing {sorted(expected - seen)[:5]}, unexpected {sorted(seen - expected)[:5]}"
            )
        if self._on_cpu:
            self._llm.collective_rpc(vllm_patches.repack_tied_output_layer)
        # Keys and values of the old weights would be reused for repeated prompts otherwise.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache: requests are still running")
        self.weight_version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Generation]:
        """Samples one response for each prompt (token ids). All TP ranks of an engine must pass equal arguments."""
        self._check_same_prompts(prompts, seeds)
        if not prompts:
            return []
        RECORDER.start(self._scored_temperature, sampling.temperature)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                logprobs=0,
                detokenize=False,
                extra_args={REQUEST_KEY: i},
            )
            for i, seed in enumerate(seeds)
        ]
        # Seeded requests draw from their own generators, yet generate() advances torch's global one too.
        # By default fork_rng would save the generators of every GPU that it sees, and open a context on each.
        with torch.random.fork_rng(devices=[] if self._on_cpu else [torch.cuda.current_device()]):
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        tapped = self._tapped_rows()
        return [self._generation(i, output, tapped, sampling) for i, output in enumerate(outputs)]

    def sleep(self) -> None:
        """Frees weights and KV cache between rollouts (CUDA only)."""
        if not self._on_cpu:
            self._llm.sleep(level=2)

    def wake_for_weights(self) -> None:
        """Allocates the weights again; the KV cache follows after they are loaded, to keep the peak low."""
        if not self._on_cpu:
            self._llm.wake_up(tags=["weights"])

    def wake_for_rollouts(self) -> None:
        """Allocates the KV cache again."""
        if not self._on_cpu:
            self._llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        """Shuts the engine down while the process groups that it made can still be destroyed."""
        self._llm.llm_engine.engine_core.shutdown()

    def _tapped_rows(self) -> TappedRows:
        """Rows of all requests of a call, on every rank of the engine."""
        mine = RECORDER.rows()
        if not self.setup.deals_rows:
            return mine
        parts = [mine] * self.layout.tensor
        dist.all_gather_object(parts, mine, group=self._tp_group)
        return TappedRows.merged(parts)

    def _generation(self, request: int, output: Any, tapped: TappedRows, sampling: Sampling) -> Generation:
        completion = output.outputs[0]
        token_ids = np.asarray(completion.token_ids, dtype=np.int32)
        rows = tapped.of_response(request, len(token_ids))
        raw = np.asarray(
            [
                step[token].logprob
                for step, token in zip(completion.logprobs, token_ids.tolist(), strict=True)
            ],
            dtype=np.float64,
        )
        logits = raw + rows[:, LSE]
        sampling_temperature = sampling.temperature or 1.0
        return Generation(
            token_ids=token_ids,
            sampling_logprobs=(logits / sampling_temperature - rows[:, LSE_SAMPLED]).astype(np.float32),
            logprobs=(logits / self._scored_temperature - rows[:, LSE_SCORED]).astype(np.float32),
            entropies=rows[:, ENTROPY].astype(np.float32),
            finished=completion.finish_reason == "stop",
        )

    def _check_same_prompts(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        """A mismatch inside an engine does not hang, it returns wrong rows: compare before generating."""
        if self.layout.tensor == 1:
            return
        digest = hashlib.sha256(repr((list(map(list, prompts)), list(seeds))).encode()).hexdigest()
        digests: list[str] = [""] * self.layout.tensor
        dist.all_gather_object(digests, digest, group=self._tp_group)
        if len(set(digests)) != 1:
            raise RuntimeError(f"the ranks of engine {self.replica} were given different prompts")
