"""Does a run fit into the memory of its devices? Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from sead_megatron.errors import UserError
from sead_megatron.plan.devices import GIB
from sead_megatron.plan.memory import PHASES, RankMemory

USABLE_SHARE = 0.95
"""Of a device's memory: the allocator's fragments need the rest."""

_REMEDIES = {
    "student weights": "raise student.parallel.tensor or pipeline",
    "gradients": "raise student.parallel.tensor or pipeline",
    "student FP8 copies": "raise student.parallel.tensor or pipeline, or set precision.student to bfloat16",
    "optimizer masters": "set optimizer.distributed to true, or use more ranks",
    "optimizer moments": "set optimizer.distributed to true, or use more ranks",
    "teacher weights": "raise teacher.parallel.tensor or pipeline, or set precision.teacher to an FP8 format",
    "teacher output layer": "raise student.parallel.tensor",
    "teacher averages": "raise student.parallel and teacher.parallel, or leave out teacher.ema",
    "reference model": "raise reference.parallel.tensor or pipeline",
    "teacher activations": "lower batch.max_tokens_per_microbatch, or raise teacher.parallel.tensor",
    "teacher hidden states": "set teacher.offload_hidden to true",
    "activations": "set student.recompute to full, or lower batch.max_tokens_per_microbatch",
    "loss head": "lower batch.max_tokens_per_microbatch",
    "logit cache": "lower kernel.cache_mib",
    "engine weights": "raise rollout.tensor_parallel",
    "KV cache": "lower rollout.kv_cache_gib or rollout.gpu_memory_utilization",
    "gathered weights": "lower rollout.sync_bucket_mib",
}


def fits(memory: RankMemory, memory_bytes: int) -> bool:
    """Whether a rank's peak leaves the allocator its share."""
    return memory.peak <= USABLE_SHARE * memory_bytes


def check_fit(memory: Sequence[RankMemory], memory_bytes: int, device: str) -> None:
    """Raises UserError for the fullest rank when it does not fit, naming the term that is one too many."""
    fullest = max(memory, key=lambda rank: rank.peak)
    if fits(fullest, memory_bytes):
        return
    limit = USABLE_SHARE * memory_bytes
    phase = fullest.peak_phase
    term, size = _breaking_term(fullest.terms(phase), limit)
    raise UserError(
        f"memory of rank {fullest.rank} in the {phase} phase",
        f"{fullest.peak / GIB:.1f} GiB",
        f"must be at most {limit / GIB:.1f} GiB ({USABLE_SHARE:.0%} of {device}); it ends with {term} "
        f"({size / GIB:.1f} GiB)",
        f"{_REMEDIES.get(term, 'use more ranks')}; tools/plan.py shows every term",
    )


def _breaking_term(terms: dict[str, int], limit: float) -> tuple[str, int]:
    """The first term, the long-lived ones before the phase's, with which the sum exceeds the limit."""
    total = 0
    for name, size in terms.items():
        total += size
        if total > limit:
            return name, size
    raise ValueError("the terms fit")


def fullest_by_phase(memory: Sequence[RankMemory]) -> dict[str, RankMemory]:
    """For each phase the rank that needs most in it."""
    return {phase: max(memory, key=lambda rank: rank.total(phase)) for phase in PHASES}
