"""The rollout engine against the trainer: logprobs and entropies of sampled tokens, before and after an update."""

from __future__ import annotations

from typing import Any

import numpy as np
import rank
import torch
import torch.distributed as dist
from update import config_of


def body(student: str, teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    """Differences of engine and trainer over two rounds with an update in between."""
    from sead_megatron.data.types import TokenTable
    from sead_megatron.models.export import expected_hf_names, stream_hf_tensors
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel import megatron_on_cpu
    from sead_megatron.rollout.collect import as_rollout, generate_everywhere, request_seed
    from sead_megatron.rollout.engine import RolloutEngine, Sampling
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    config = config_of(case, student, teacher)
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(
                update={"tensor_parallel": case["engine"], "max_model_len": 512, "kv_cache_gib": 0.0625, "max_num_seqs": 8}
            )
        }
    )
    engine = RolloutEngine(
        config.rollout,
        student,
        dtype="float32",
        on_cpu=True,
        seed=0,
        scored_temperature=config.objective.temperature,
    )
    megatron_on_cpu.install()
    models = build_models(config, torch.device("cpu"))
    objective = build_objective(config.objective, 2)
    model = models.student.model
    generator = np.random.default_rng(3)
    # Longer than 128 tokens, or the CPU engine caches no prefix and a stale cache would go unseen.
    prompts = [generator.integers(3, 250, 150 + 7 * i).tolist() for i in range(10)]
    report: dict[str, Any] = {"logprob": [], "entropy": [], "tokens": [], "repeats_equal": []}
    for step in range(2):
        engine.load_weights(stream_hf_tensors(model, 1), expected_hf_names(model), step)
        sampling = Sampling(0.7, 20, (2,))
        seeds = [request_seed(0, i) for i in range(len(prompts))]
        generations = generate_everywhere(engine, prompts, seeds, sampling)
        again = generate_everywhere(engine, prompts, seeds, sampling)
        report["repeats_equal"].append(
            all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(generations, again, strict=True))
        )
        rollouts = [as_rollout(i, p, g, engine.weight_version) for i, (p, g) in enumerate(zip(prompts, generations, strict=True))]
        plan = plan_step(rollouts, model.groups.layout, models.teacher.layout)
        scores = models.teacher.score(plan)
        table = TokenTable.from_rollouts(rollouts, "cpu")
        stats = models.student.token_stats(plan, scores)
        report["logprob"].append((table.rollout_logprob - stats["student_logprob"]).abs().max().item())
        report["entropy"].append((table.student_entropy - stats["student_entropy"]).abs().max().item())
        report["tokens"].append(table.num_tokens)
        table = table.with_columns(**stats)
        update = models.student.train_step(plan, scores, objective.coefficients(table, step))
        assert update.applied
    dist.barrier()
    return report


if __name__ == "__main__":
    import os

    from sead_megatron.rollout.environment import prepare_environment

    prepare_environment(on_cpu=True)
    os.environ.setdefault("MASTER_PORT", "0")
    rank.run(body, redirect=False)
