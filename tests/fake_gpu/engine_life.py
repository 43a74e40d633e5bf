"""The life of a rollout engine on fake GPUs: start, weights, rollouts, sleep, and all of it again.

    python -m torch.distributed.run --nproc-per-node RANKS tests/fake_gpu/engine_life.py ARGUMENTS.json REPORT.json

ARGUMENTS: `model`, a Hugging Face directory; `rollout`, fields of the configuration's section.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

PROMPTS = [[1, 5, 6, 7], [1, 5, 6, 7, 8, 9, 10, 11], [1, 9], [1, 4, 4]]
NEW_TOKENS = 8
DEFAULTS = {
    "max_new_tokens": 16,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_gib": 0.25,
    "enforce_eager": True,
}


def name_the_runtime() -> None:
    """vLLM looks for a CUDA runtime among the loaded files; torch has loaded the real one too, which has no driver."""
    from vllm.distributed.device_communicators import cuda_wrapper

    cuda_wrapper.find_loaded_library = lambda name: None  # VLLM_CUDART_SO_PATH is asked then


def used_mib() -> float:
    """Of this rank's GPU, by everybody in this process."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / (1 << 20)


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Two rounds; what is reported of them is checked by the caller."""
    import torch
    import torch.distributed as dist
    from scripted_sampler import install as script_the_samplers

    from sead_megatron.config import RolloutConfig
    from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
    from sead_megatron.rollout.engine import RolloutEngine, Sampling
    from sead_megatron.training import job

    name_the_runtime()
    # It counts ranks with a kernel, which counts nothing.
    job.check_reachable = lambda device: None
    job.init_world("cuda")
    engine = RolloutEngine(
        RolloutConfig(**(DEFAULTS | arguments["rollout"])),
        arguments["model"],
        dtype="bfloat16",
        on_cpu=False,
        seed=1,
        scored_temperature=1.0,
    )
    script_the_samplers(asynchronous=arguments["rollout"].get("async_scheduling", True))
    weights = CheckpointWeights(arguments["model"])
    memory: dict[str, float] = {}
    rounds = []
    warned: set[str] = set()
    for version in range(2):
        engine.wake_for_weights()
        engine.load_weights(weights, version)
        engine.wake_for_rollouts()
        memory["awake"] = used_mib()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            generated = engine.generate(PROMPTS, list(range(len(PROMPTS))), Sampling(0.7, NEW_TOKENS, (2,)))
        warned |= {str(warning.message) for warning in said}
        rounds.append(
            [
                {
                    "tokens": g.token_ids.tolist(),
                    "statistics": [len(g.logprobs), len(g.entropies), len(g.sampling_logprobs)],
                    "finished": g.finished,
                }
                for g in generated
            ]
        )
        engine.sleep()
        memory["asleep"] = used_mib()
    report = {
        "setup": engine.setup.description,
        "rounds": rounds,
        "memory": memory,
        "contexts": contexts(torch.cuda.device_count()),
        "version": engine.weight_version,
        "warnings": sorted(warned),
    }
    engine.close()
    dist.barrier()
    dist.destroy_process_group()
    return report


def contexts(devices: int) -> list[int]:
    """The GPUs on which this process has a context, half a gigabyte each on a real one."""
    import ctypes

    library = ctypes.CDLL(os.environ["FAKE_CUDA_LIB"])
    return [device for device in range(devices) if library.fake_has_context(device)]


def main() -> None:
    """The arguments' case; rank 0 writes the report."""
    arguments = json.loads(Path(sys.argv[1]).read_text())
    from sead_megatron.rollout.environment import prepare_environment

    prepare_environment(on_cpu=False)
    report = run(arguments)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
