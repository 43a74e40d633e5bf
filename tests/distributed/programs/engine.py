"""The rollout engine against the trainer: logprobs and entropies of sampled tokens, before and after an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import rank
import torch
import torch.distributed as dist
from update import config_of

NUM_PROMPTS = 10


class Incomplete:
    """A weight stream without one of its tensors."""

    def __init__(self, stream: Any, leave_out: str) -> None:
        self.names = stream.names
        self._stream, self._leave_out = stream, leave_out

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in self._stream if name != self._leave_out)


class Comparison:
    """An engine and a trainer with the same weights, as long as they are synchronised."""

    def __init__(self, student: str, teacher: str, case: dict[str, Any]) -> None:
        from sead_megatron.models.export import HFStream
        from sead_megatron.objectives import build_objective
        from sead_megatron.parallel import megatron_on_cpu
        from sead_megatron.rollout.engine import RolloutEngine
        from sead_megatron.training.models import build_models

        config = config_of(case, student, teacher)
        rollout = {
            "tensor_parallel": case["engine"],
            "max_model_len": 512,
            "kv_cache_gib": 0.0625,
            "max_num_seqs": 8,
        }
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
        self.engine = RolloutEngine(
            config.rollout,
            student,
            dtype="float32",
            on_cpu=True,
            seed=0,
            scored_temperature=config.objective.temperature,
        )
        megatron_on_cpu.install()
        self.models = build_models(config, torch.device("cpu"))
        self.stream = HFStream(self.models.student.model, 1)
        self.objective = build_objective(config.objective, 2)
        generator = np.random.default_rng(3)
        # Longer than 128 tokens, or the CPU engine caches no prefix and a stale cache would go unseen.
        self.prompts = [generator.integers(3, 250, 150 + 7 * i).tolist() for i in range(NUM_PROMPTS)]
        self.step = 0

    def sync(self, leave_out: str | None = None) -> None:
        """Gives the engine the trainer's weights, all of them or all but one tensor."""
        weights = self.stream if leave_out is None else Incomplete(self.stream, leave_out)
        self.engine.load_weights(weights, self.step)

    def sync_without(self, what: str) -> None:
        """Negative controls: leaves out what makes the new weights count everywhere."""
        from sead_megatron.rollout import vllm_patches

        if what == "repack":
            with mock.patch.object(vllm_patches, "repack_tied_output_layer", _nothing):
                self.sync()
        else:
            with mock.patch.object(self.engine._llm, "reset_prefix_cache", lambda: True):
                self.sync()

    def round(self, name: str) -> dict[str, Any]:
        """Generates (twice), compares every sampled token with the trainer, and updates the trainer."""
        from sead_megatron.data.types import TokenTable
        from sead_megatron.rollout.collect import as_rollout, generate_everywhere, request_seed
        from sead_megatron.rollout.engine import Sampling
        from sead_megatron.training.step_plan import plan_step

        sampling = Sampling(0.7, 20, (2,))
        seeds = [request_seed(0, i) for i in range(len(self.prompts))]
        generations = generate_everywhere(self.engine, self.prompts, seeds, sampling)
        again = generate_everywhere(self.engine, self.prompts, seeds, sampling)
        rollouts = [
            as_rollout(i, p, g, self.engine.weight_version)
            for i, (p, g) in enumerate(zip(self.prompts, generations, strict=True))
        ]
        student, teachers = self.models.student, self.models.teachers
        plan = plan_step(rollouts, student.model.groups.layout)
        scores = teachers.score(plan)
        table = TokenTable.from_rollouts(rollouts, "cpu")
        stats = student.token_stats(plan, scores)
        by_engine = self.objective.coefficients(
            table.with_columns(teacher_entropy=stats["teacher_entropy"]), 0
        )
        by_trainer = self.objective.coefficients(table.with_columns(**stats), 0)
        update = student.train_step(plan, scores, by_trainer)
        assert update.applied
        self.step += 1
        return {
            "name": name,
            "logprob": (table.rollout_logprob - stats["student_logprob"]).abs().max().item(),
            "entropy": (table.student_entropy - stats["student_entropy"]).abs().max().item(),
            "tokens": table.num_tokens,
            "zones_agree": (by_engine.zones == by_trainer.zones).float().mean().item(),
            "versions": sorted({r.weight_version for r in rollouts}),
            "repeats": all(_equal(a, b) for a, b in zip(generations, again, strict=True)),
            "responses": [g.token_ids.tolist() for g in generations],
        }


def _nothing(worker: Any) -> int:
    return 0


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)


def _error_of(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


def body(student: str, teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    """Rounds with updates in between, the negative controls that the case names, and the engine's refusals."""
    from sead_megatron.rollout.engine import Sampling

    comparison = Comparison(student, teacher, case)
    rounds = []
    for name in ("first", "updated"):
        comparison.sync()
        rounds.append(comparison.round(name))
    for control in case.get("controls", []):
        comparison.sync_without(control)
        rounds.append(comparison.round(f"without {control}"))
        comparison.sync()
        rounds.append(comparison.round(f"after {control}"))
    report: dict[str, Any] = {"rounds": rounds}
    if case["engine"] > 1:
        mine = comparison.prompts[dist.get_rank() : dist.get_rank() + 1]
        report["different_prompts"] = _error_of(comparison.engine.generate, mine, [0], Sampling(0.7, 4, (2,)))
    # The engine is unusable afterwards.
    report["incomplete"] = _error_of(comparison.sync, "model.layers.2.mlp.up_proj.weight")
    dist.barrier()
    return report


if __name__ == "__main__":
    import os

    from sead_megatron.rollout.environment import prepare_environment

    prepare_environment(on_cpu=True)
    os.environ.setdefault("MASTER_PORT", "0")
    rank.run(body, redirect=False)
