"""Environment variables that must be set before torch or vLLM is imported. Torch-free."""

from __future__ import annotations

import logging
import os
import warnings

from sead_megatron.errors import UserError


def check_environment() -> None:
    """Raises UserError for variables that break the in-process engine."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    if (value := os.environ.get(name, "0")) != "0":
        raise UserError(
            name,
            value,
            "must be 0: the engine would run in a child process, where the student's weights cannot reach it",
            f"unset {name}",
        )


def prepare_environment(*, on_cpu: bool) -> None:
    """Sets defaults that the in-process engine needs; a value that the user has set wins.

    Seen with vLLM 0.32: without the first variable the engine moves to a child process, where no tensor of
    ours can reach it.
    """
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if on_cpu:
        # Megatron and vLLM say several times that GPU packages are missing; on a CPU nobody expects them.
        warnings.filterwarnings(
            "ignore", message=".*(Transformer Engine|Apex|full scope).*", category=UserWarning
        )
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch\.distributed)")
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # torch.compile costs the first generate call 40 s and gains nothing for a run of minutes; waiting OpenMP
        # threads would steal the cores of the other ranks; binding threads assumes one engine a machine.
        defaults |= {
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # torch's C++ warnings here are about NUMA binding, one a rank.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
