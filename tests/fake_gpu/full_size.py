"""A configuration's models at full size on one fake GPU of its world: build, score, update, statistics, weight stream.

    python -m torch.distributed.run --nproc-per-node 1 tests/fake_gpu/full_size.py ARGUMENTS.json REPORT.json

ARGUMENTS: `config`, `overrides`, `world` and `rank`, the rank that is played; `rollouts` of each student replica;
`checkpoint`, a folder or null: of a world of one rank, the state is saved there and restored. No weights are read:
there are none, and memory that nobody writes costs nothing. Every rollout is as long as the configuration allows, as
the plan assumes.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

COUNTERS = (
    "launches",
    "sync_stream",
    "sync_event",
    "sync_device",
    "sync_memcpy",
    "copies_d2h",
    "pageable_d2h",
    "pageable_h2d",
)


class Gauge:
    """Memory and counters of the fake GPU since the last reading."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._library = ctypes.CDLL(os.environ["FAKE_CUDA_LIB"])
        self._library.fake_counter.restype = ctypes.c_long
        self._library.fake_counter.argtypes = [ctypes.c_char_p]

    def start(self) -> None:
        """Forgets what was."""
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        self._library.fake_reset_counters()

    def read(self) -> dict[str, int]:
        """Bytes that torch holds and held at most, and the counters."""
        import torch

        counters = {name: self._library.fake_counter(name.encode()) for name in COUNTERS}
        assert min(counters.values()) >= 0, f"the fake CUDA lacks a counter: {counters}"
        return counters | {
            "allocated": torch.cuda.memory_allocated(self._device),
            "peak": torch.cuda.max_memory_allocated(self._device),
        }


def skip_weight_files() -> None:
    """Parameters stay as they were allocated; everything after that is the product's own code."""
    import torch

    from sead_megatron.models.layouts import padded_vocab_size
    from sead_megatron.training import models

    def output_shard(config: Any, path: Any, groups: Any, dtype: Any, device: Any) -> Any:
        rows = padded_vocab_size(config.vocab_size, groups.layout.tensor) // groups.layout.tensor
        return torch.empty((rows, config.hidden_size), device=device, dtype=dtype)

    models.load_weights = lambda *arguments, **options: None
    models.load_output_shard = output_shard


def play_values_that_kernels_would_give() -> None:
    """Which rows are active is the result of a kernel: every second one, as `half_of_the_tokens` says."""
    import sead_kernels.split_kl.cuda.build as cuda_build
    import torch

    from sead_megatron.training.device_rows import ActiveRows, to_device

    def every_second(weighted: Any, divergence: Any, device: Any) -> ActiveRows:
        rows = to_device(torch.arange(0, len(weighted), 2), device)
        return ActiveRows(rows, rows)

    ActiveRows.of = every_second
    # Launches of a static runtime would not reach the fake one.
    cuda_build._NVCC_FLAGS = tuple("shared" if flag == "static" else flag for flag in cuda_build._NVCC_FLAGS)


def play_shapes_of_other_stages(tokens: int) -> None:
    """What a stage is told before it receives; every row has so many tokens. (A real run waits for it each time.)"""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def shapes(
        self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Any, Any]:
        config = self.config
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shape = [-(-tokens // parts), 1, config.hidden_size]
        return (shape if recv_prev else None, shape if recv_next else None)

    P2PCommunicator._communicate_shapes = shapes


def longest_rollouts(config: Any, count: int) -> list[Any]:
    """As long as the configuration allows."""
    import numpy as np

    from sead_megatron.data.types import Rollout

    response = config.rollout.max_new_tokens
    prompt = config.rollout.max_model_len - response
    nothing = np.zeros(response, dtype=np.float32)
    return [
        Rollout(
            prompt_index=i,
            prompt_ids=np.arange(prompt, dtype=np.int32) % 1000 + 5,
            response_ids=np.arange(response, dtype=np.int32) % 1000 + 5,
            logprobs=nothing,
            entropies=nothing,
            finished=True,
            weight_version=0,
            sampling_logprobs=nothing,
        )
        for i in range(count)
    ]


def half_of_the_tokens(tokens: int, device: Any) -> Any:
    """Coefficients that leave every second token in the loss."""
    import torch

    from sead_megatron.data.terms import Term
    from sead_megatron.data.types import Coefficients

    weights = torch.zeros(tokens, 4)
    weights[::2, Term.REVERSE_KL] = 1
    return Coefficients(weights.to(device), float(tokens // 2))


def calibration_prompts(config: Any) -> list[Any]:
    """What ModelOpt is calibrated on."""
    from sead_megatron.data.types import Prompt

    if config.precision.teacher != "modelopt_fp8":
        return []
    return [
        Prompt(id=str(i), messages=[], token_ids=list(range(5, 200)), answer=None, domain=None)
        for i in range(4)
    ]


def state_of(student: Any) -> dict[str, Any]:
    """Everything of a checkpoint that is a tensor, by key and place: views of the model's and optimizer's memory."""
    from sead_megatron.training.checkpoint_shards import ModelShards

    return {f"{s.key} {s.offsets}": s.data for s in ModelShards(student, None).needed(moments=True)}


def fill(student: Any) -> dict[str, Any]:
    """Random numbers in the state of a student, by copies from the host."""
    import torch

    generator, numbers = torch.Generator().manual_seed(0), {}
    for name, tensor in state_of(student).items():
        numbers[name] = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        tensor.copy_(numbers[name])
    return numbers


def different(student: Any, numbers: dict[str, Any]) -> list[str]:
    """Names of the tensors that do not hold these numbers to the bit."""
    import torch

    state = state_of(student)
    assert state.keys() == numbers.keys()
    return [name for name, value in numbers.items() if not torch.equal(state[name].cpu(), value)]


def planned(config: Any, world: int, rank: int, rollouts: int) -> dict[str, dict[str, int]]:
    """Bytes that the plan expects in each phase of a step of so many rollouts, by term; the engine is not here."""
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.plan.devices import DEVICES
    from sead_megatron.plan.memory import PHASES, Run, plan_memory

    sections = {
        "data": config.data.model_copy(update={"prompts_per_step": rollouts}),
        "rollout": config.rollout.model_copy(update={"samples_per_prompt": 1}),
    }
    config = config.model_copy(update=sections)
    teachers = tuple(read_hf_config(path) for path in config.teachers)
    run = Run(config, read_hf_config(config.student.path), teachers, world, DEVICES["h100"])
    (memory,) = plan_memory(run, [rank])
    absent = {"process", "engine weights", "engine workspace", "engine asleep", "KV cache"}
    # Of the student's first forward pass: models are built, and the teacher scores, before it.
    later = {"student FP8 copies"}
    terms = {phase: memory.terms(phase) for phase in PHASES}
    terms |= {"build": memory.always, "teacher": memory.terms("teacher", first_step=True)}
    for phase in ("build", "teacher"):
        terms[phase] = {term: size for term, size in terms[phase].items() if term not in later}
    return {
        phase: {term: size for term, size in named.items() if term not in absent}
        for phase, named in terms.items()
    }


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What was measured, beside what the plan says."""
    import te_attention
    from computed_step import load, save

    from sead_megatron.config import load_config
    from sead_megatron.models.export import HFStream
    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training import job
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    config = load_config(arguments["config"], arguments["overrides"])
    # It counts ranks with a kernel that counts nothing.
    job.check_reachable = lambda device: None
    device = job.init_world("cuda")
    attention = te_attention.install()
    skip_weight_files()
    play_values_that_kernels_would_give()
    play_shapes_of_other_stages(config.rollout.max_model_len)
    gauge = Gauge(device)
    gauge.start()
    models = build_models(config, device, calibration_prompts(config))
    readings = {"build": gauge.read()}
    student = models.student
    layout = student.model.groups.layout
    plan = plan_step(longest_rollouts(config, arguments["rollouts"] * layout.data), layout)
    gauge.start()
    scores = models.teachers.score(plan)
    readings["teacher"] = gauge.read()
    coefficients = half_of_the_tokens(plan.num_tokens, device)
    for step in ("first update", "update"):
        gauge.start()
        applied = student.train_step(plan, scores, coefficients).applied
        readings[step] = gauge.read() | {"applied": applied}
    gauge.start()
    student.token_stats(plan, scores, 0)
    readings["stats"] = gauge.read()
    del scores
    gauge.start()
    elements = sum(tensor.numel() for _, tensor in HFStream(student.model, config.rollout.sync_bucket_mib))
    readings["sync"] = gauge.read()
    rows = len(plan.student[student.model.groups.dp_rank])
    kept: dict[str, Any] = {}
    if arguments["checkpoint"] is not None:
        directory = Path(arguments["checkpoint"])
        numbers = fill(student)
        save(models, directory)
        destroy_groups()
        models = build_models(config, device)
        load(models, directory)
        kept = {"tensors": len(numbers), "different": different(models.student, numbers)}
        update = models.student.train_step(plan, models.teachers.score(plan), coefficients)
        kept["applied"] = update.applied
    return {
        "readings": readings,
        "planned": planned(config, arguments["world"], arguments["rank"], len(plan.rollouts)),
        "microbatches": rows,
        "streamed": elements,
        "attention": sorted(attention),
        "checkpoint": kept,
    }


def main() -> None:
    """Plays the rank and writes the report."""
    arguments = json.loads(Path(sys.argv[1]).read_text())
    from fake_world import play_rank

    play_rank(arguments["rank"], arguments["world"])
    report = run(arguments)
    Path(sys.argv[2]).write_text(json.dumps(report))
    # Groups of ranks that never came cannot be taken apart.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
