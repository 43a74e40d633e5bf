"""vLLM's greedy output and logprobs of a student of any family, against ours and the reference's, then an update."""

from __future__ import annotations

from typing import Any

import numpy as np
import rank
import torch
from reference import reference
from update import config_of


def body(student: str, teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    """Rounds before and after an update: the largest differences of sampled tokens' logprobs and entropies.

    The engine's greedy continuation of the first round is also checked token by token against the reference model.
    """
    from sead_megatron.data.types import TokenTable
    from sead_megatron.models.export import HFStream
    from sead_megatron.objectives import build_objective
    from sead_megatron.parallel import megatron_on_cpu
    from sead_megatron.rollout.collect import as_rollout, generate_everywhere
    from sead_megatron.rollout.engine import RolloutEngine, Sampling
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    generator = np.random.default_rng(3)
    prompts = [generator.integers(3, 250, 9 + 4 * i).tolist() for i in range(6)]
    # Before the engine, which decorates transformers' classes when it builds on them.
    expected = [greedy(student, prompt, 20) for prompt in prompts]
    config = config_of({"max_tokens": 512, "packing": True} | case, student, teacher)
    rollout = {"tensor_parallel": case["engine"], "max_model_len": 128, "kv_cache_gib": 0.0625}
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
    engine = RolloutEngine(
        config.rollout, student, dtype="float32", on_cpu=True, seed=0, scored_temperature=1.0
    )
    megatron_on_cpu.install()
    models = build_models(config, torch.device("cpu"))
    stream = HFStream(models.student.model, 1)
    objective = build_objective(config.objective, 2)
    rounds = []
    for step in range(2):
        engine.load_weights(stream, step)
        generations = generate_everywhere(engine, prompts, [1] * len(prompts), Sampling(0.0, 20, (2,)))
        rollouts = [
            as_rollout(i, prompt, generation, step)
            for i, (prompt, generation) in enumerate(zip(prompts, generations, strict=True))
        ]
        plan = plan_step(rollouts, models.student.model.groups.layout)
        scores = models.teachers.score(plan)
        table = TokenTable.from_rollouts(rollouts, "cpu")
        stats = models.student.token_stats(plan, scores)
        report = {
            "logprob": (table.rollout_logprob - stats["student_logprob"]).abs().max().item(),
            "entropy": (table.student_entropy - stats["student_entropy"]).abs().max().item(),
            "tokens": table.num_tokens,
        }
        if step == 0:
            report |= compare(generations, expected)
        coefficients = objective.coefficients(table.with_columns(**stats), step)
        assert models.student.train_step(plan, scores, coefficients).applied
        rounds.append(report)
    return {"rounds": rounds, "prompts": len(prompts)}


def greedy(student: str, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
    """The reference's greedy continuation up to token 2, and its logprobs."""
    tokens, logprobs = list(prompt), []
    while len(tokens) < len(prompt) + length and tokens[-1] != 2:
        logits, _ = reference(student, torch.tensor([tokens]), torch.float32)
        best = logits[0, -1].log_softmax(-1).max(-1)
        tokens.append(int(best.indices))
        logprobs.append(float(best.values))
    return tokens[len(prompt) :], logprobs


def compare(generations: list[Any], expected: list[tuple[list[int], list[float]]]) -> dict[str, Any]:
    """Whether the engine continued as the reference did, and the largest difference of logprobs where it did."""
    pairs = list(zip(generations, expected, strict=True))
    same = [generation.token_ids.tolist() == tokens for generation, (tokens, _) in pairs]
    worst = [
        np.abs(generation.logprobs - np.array(logprobs)).max()
        for (generation, (_, logprobs)), equal in zip(pairs, same, strict=True)
        if equal
    ]
    return {"greedy": sum(same), "reference_logprob": float(max(worst, default=np.inf))}


if __name__ == "__main__":
    import os

    from sead_megatron.rollout.environment import prepare_environment

    prepare_environment(on_cpu=True)
    os.environ.setdefault("MASTER_PORT", "0")
    rank.run(body, redirect=False)
