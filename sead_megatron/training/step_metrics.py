"""One step's record of `metrics.jsonl` and its sampled rollouts, from what the step produced."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sead_megatron.data.types import Coefficients, Prompt, Rollout, TokenTable
from sead_megatron.evaluation.grader import Grader
from sead_megatron.models.tokenizer import Tokenizer
from sead_megatron.training.student import Update

_ZONE_NAMES = "ABC"


def rollout_metrics(rollouts: Sequence[Rollout], passed: Sequence[bool | None]) -> dict[str, float]:
    """Lengths, truncation, empty responses and pass rate of the global batch."""
    count = len(rollouts)
    graded = [flag for flag in passed if flag is not None]
    metrics = {
        "rollout/length_mean": sum(len(r.response_ids) for r in rollouts) / count,
        "rollout/truncated": sum(not r.finished for r in rollouts) / count,
        "rollout/empty": float(sum(len(r.response_ids) == 0 for r in rollouts)),
    }
    if graded:
        metrics["rollout/pass_rate"] = sum(graded) / len(graded)
    return metrics


def engine_trainer_differences(engine: TokenTable, table: TokenTable, update: Update) -> dict[str, float]:
    """How far the engine's logprobs and entropies are from the trainer's on the active tokens.

    `engine` holds what the sampler gave. The trainer's are those of the update, or of the pass before it (`table`)
    where the loss looked at other tokens than the sampled ones.
    """
    metrics: dict[str, float] = {}
    if not bool(update.active.any()):
        return metrics
    columns = {
        "rollout/logprob_diff": ("rollout_logprob", "student_logprob"),
        "entropy/engine_trainer_diff": ("student_entropy", "student_entropy"),
    }
    for name, (ours, theirs) in columns.items():
        trainer = update.columns[theirs] if theirs in update.columns else table.require(theirs)
        difference = (engine.require(ours) - trainer)[update.active].abs()
        metrics[f"{name}_mean"] = float(difference.mean())
        metrics[f"{name}_max"] = float(difference.max())
    return metrics


def evaluation_metrics(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """What a record of `evaluations.jsonl` adds to the step's."""
    if evaluation is None:
        return {}
    metrics = {"evaluation/accuracy": evaluation["accuracy"]} if "accuracy" in evaluation else {}
    scores = evaluation.get("benchmarks", {}).items()
    return metrics | {f"evaluation/{name}": result["score"] for name, result in scores}


def active_kl(update: Update) -> dict[str, float]:
    """Mean divergences over the active tokens, where the loss evaluated them, for steps that measure no others."""
    if not bool(update.active.any()):
        return {}
    names = {"kl/forward": "forward_kl", "kl/reverse": "reverse_kl"}
    return {
        key: float(update.columns[name][update.active].double().mean())
        for key, name in names.items()
        if name in update.columns
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The largest peak over the ranks (a collective over the world): allocator on CUDA, resident set on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = torch.tensor(peak, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def grader_counts(grader: Grader, device: torch.device) -> dict[str, float]:
    """Answers that the graders of all ranks gave up since the last record (a collective over the world)."""
    counts = torch.tensor(grader.take_counts(), dtype=torch.int64, device=device)
    dist.all_reduce(counts)
    timeouts, crashes = counts.tolist()
    return {"grader/timeouts": float(timeouts), "grader/crashes": float(crashes)}


def rollout_records(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    passed: Sequence[bool | None],
    table: TokenTable,
    coefficients: Coefficients,
    tokenizer: Tokenizer,
    limit: int,
) -> Iterator[dict[str, Any]]:
    """The first `limit` rollouts with their text and, token by token, zones, entropies and divergences."""
    columns = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")
    for i, rollout in enumerate(rollouts[:limit]):
        tokens = table.rollout_slice(i)
        record: dict[str, Any] = {
            "prompt_id": prompts[rollout.prompt_index].id,
            "prompt": prompts[rollout.prompt_index].messages,
            "response": tokenizer.decode(rollout.response_ids.tolist()),
            "answer": prompts[rollout.prompt_index].answer,
            "reward": None if passed[i] is None else float(bool(passed[i])),
            "finished": rollout.finished,
            "weight_version": rollout.weight_version,
            "tokens": rollout.trained_ids.tolist(),
            "token_texts": [tokenizer.decode([token]) for token in rollout.trained_ids.tolist()],
        }
        if rollout.logprobs is not None:
            record["logprobs"] = _rounded(torch.from_numpy(rollout.logprobs))
        if coefficients.zones is not None:
            record["zones"] = "".join(_ZONE_NAMES[zone] for zone in coefficients.zones[tokens].tolist())
        for name in columns:
            column = getattr(table, name)
            if column is not None:
                record[name] = _rounded(column[tokens])
        yield record


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
