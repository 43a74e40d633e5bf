"""Generation by vLLM's CUDA engine on a fake GPU that computes, against transformers on the CPU, number for number.

    python -m torch.distributed.run --nproc-per-node 1 tests/fake_gpu/computed_rollout.py ARGUMENTS.json REPORT.json

The runner's torch operators compute on the CPU, its Triton kernels (block tables, KV cache, attention, sampling) in
Triton's interpreter; of operators that vLLM wrote in C++ its own torch versions are taken. The rollout engine starts,
takes weights, generates greedily and by sampling, sleeps, wakes and does it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 4
TEMPERATURES = {"greedy": 0.0, "sampled": 0.7}
STOP = 3
# Of several lengths; the last does not fit into one scheduling step with the others, so it is prefilled in pieces.
PROMPTS = [[2, 5, 6, 7], [2, 9, 11, 12, 30, 31, 4], [2, 40, 41], [2, *range(5, 30)]]
SCHEDULED_TOKENS = 24


def choose_operators_that_compute() -> None:
    """vLLM's native operators and Triton's attention, as small as they go, in every engine that is started."""
    import vllm.model_executor.models.registry as registry
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp

    from sead_megatron.rollout import engine as engine_module

    # vLLM asks a child process about the model's class, which imports everything once more.
    registry._run_in_subprocess = lambda ask: ask()
    # Its Triton kernel is more than the interpreter knows (Triton 3.8: 'int' object has no attribute 'to').
    topk_topp.HAS_TRITON = False
    real_options = engine_module.engine_options

    def options(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return real_options(*args, **kwargs) | {
            "attention_backend": "TRITON_ATTN",
            "compilation_config": {"custom_ops": ["none"], "mode": 0},
            # Norms are chosen apart from the other operators.
            "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
            "kv_cache_memory_bytes": 4 << 20,
            "max_num_batched_tokens": SCHEDULED_TOKENS,
        }

    engine_module.engine_options = options


def start_engine(model: str, asynchronous: bool) -> Any:
    """The rollout engine in float32."""
    from sead_megatron.config import RolloutConfig
    from sead_megatron.rollout.engine import RolloutEngine

    config = RolloutConfig(
        max_new_tokens=NEW_TOKENS,
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_gib=0.01,
        tensor_parallel=1,
        enforce_eager=True,
        async_scheduling=asynchronous,
    )
    return RolloutEngine(config, model, dtype="float32", on_cpu=False, seed=1, scored_temperature=1.0)


def differences(model: Any, generations: list[Any]) -> dict[str, float]:
    """The largest differences to transformers, and how many tokens are not the likeliest ones."""
    import torch

    found = {"logprobs": 0.0, "entropies": 0.0, "not the likeliest": 0.0}
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = torch.tensor([[*prompt, *generation.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        wanted = {
            "logprobs": logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0],
            "entropies": -(logprobs.exp() * logprobs).sum(-1),
        }
        for name, values in wanted.items():
            found[name] = max(found[name], float(np.abs(getattr(generation, name) - values.numpy()).max()))
        likeliest = logprobs.argmax(-1).numpy()
        found["not the likeliest"] += float((generation.token_ids != likeliest).sum())
    return found


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What was generated in two rounds, and how far it is from transformers' numbers."""
    import torch
    import torch.distributed as dist
    from computed_step import join_world
    from engine_life import name_the_runtime
    from transformers import AutoModelForCausalLM

    from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
    from sead_megatron.rollout.engine import Sampling

    name_the_runtime()
    choose_operators_that_compute()
    join_world("cuda")
    path = arguments["model"]
    engine = start_engine(path, arguments["asynchronous"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights, seeds = CheckpointWeights(path), list(range(len(PROMPTS)))
    rounds = []
    for version in range(2):
        engine.wake_for_weights()
        engine.load_weights(weights, version)
        engine.wake_for_rollouts()
        generated = {
            name: engine.generate(PROMPTS, seeds, Sampling(temperature, NEW_TOKENS, (STOP,)))
            for name, temperature in TEMPERATURES.items()
        }
        rounds.append(
            {
                name: {"tokens": [g.token_ids.tolist() for g in generations]}
                | differences(model, generations)
                for name, generations in generated.items()
            }
        )
        engine.sleep()
    report = {"setup": engine.setup.description, "rounds": rounds}
    engine.close()
    dist.destroy_process_group()
    return report


def main() -> None:
    """The arguments' case."""
    arguments = json.loads(Path(sys.argv[1]).read_text())
    from computed_step import hide_transformer_engine

    from sead_megatron.rollout.environment import prepare_environment

    hide_transformer_engine()
    prepare_environment(on_cpu=False)
    Path(sys.argv[2]).write_text(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
