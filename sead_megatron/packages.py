"""Do the packages that a run needs fit the run and each other? And which layers do its models get from them?

Asked before processes start, and by every rank, since nodes may differ. Neither Megatron nor vLLM is imported here.
"""

from __future__ import annotations

import importlib

import torch

from sead_megatron.config import TrainConfig
from sead_megatron.config.schema import FP8_RECIPES
from sead_megatron.errors import UserError
from sead_megatron.requirements import (
    FUSED_GRADIENTS,
    MEGATRON,
    MODELOPT,
    TENSORBOARD,
    TRANSFORMER_ENGINE,
    VLLM,
    VLLM_ON_CPU,
    WANDB,
    check_companions,
    check_installed,
    installed,
    is_importable,
)

# What an import of a compiled extension raises: an undefined symbol of another torch, a library that is not there,
# a check of its own.
_BROKEN_IMPORT = (ImportError, OSError, RuntimeError, AssertionError)

_TE_CORES = ("transformer-engine-cu13", "transformer-engine-cu12")
_TE_EXTENSION = "transformer-engine-torch"


def check_packages(config: TrainConfig) -> None:
    """Raises UserError for the first package that is missing, of another version, or built for another torch."""
    on_gpu = config.device == "cuda"
    engine = [VLLM if on_gpu else VLLM_ON_CPU] if config.loads_engine else []
    requirements = [MEGATRON, *engine]
    if _teacher_precision(config) == "modelopt_fp8":
        requirements.append(MODELOPT)
    if config.metrics.wandb != "off":
        requirements.append(WANDB)
    if config.metrics.tensorboard:
        requirements.append(TENSORBOARD)
    for requirement in requirements:
        check_installed(requirement)
    for requirement in engine:
        check_companions(requirement)
    if on_gpu:
        _check_layers(config)


def describe_layers(config: TrainConfig) -> str:
    """What the models of a run on CUDA are made of, in a line, once `check_packages` has passed."""
    found = installed(TRANSFORMER_ENGINE.distributions)
    if is_importable(TRANSFORMER_ENGINE.module):
        version = "" if found is None else f" {found[1]}"
        text = f"layers: Transformer Engine{version}, which fuses gradient accumulation"
        if _teacher_precision(config) == "modelopt_fp8":
            text += "; the teacher's linear layers are Megatron's, for ModelOpt"
        return text
    fused = "fused by apex" if is_importable(FUSED_GRADIENTS) else f"not fused: there is no {FUSED_GRADIENTS}"
    return (
        "layers: local, without Transformer Engine (precision.allow_local_layers): one attention call a sequence, no "
        f"FP8; gradient accumulation is {fused}"
    )


def _teacher_precision(config: TrainConfig) -> str | None:
    return config.precision.teacher if config.teachers else None


def _check_layers(config: TrainConfig) -> None:
    """Transformer Engine, or what takes its place where the configuration allows that."""
    if is_importable(TRANSFORMER_ENGINE.module):
        _check_transformer_engine()
        return
    if FP8_RECIPES.keys() & {config.precision.student, _teacher_precision(config)}:
        check_installed(TRANSFORMER_ENGINE)
    if not config.precision.allow_local_layers:
        raise UserError(
            "transformer-engine",
            None,
            "not installed; without it the models get layers of plain torch operators, with an attention call for "
            "each sequence",
            "use an image that brings it, or set precision.allow_local_layers to true",
        )
    _check_apex()


def _check_transformer_engine() -> None:
    check_installed(TRANSFORMER_ENGINE)
    found = installed(TRANSFORMER_ENGINE.distributions)
    version = None if found is None else found[1]
    remedy = (
        "install one version of all its parts, built for this torch: pip install --no-build-isolation "
        f"'transformer-engine[pytorch]{'' if version is None else f'=={version}'}'; or use an image that brings it"
    )
    # In a build from source, as in NVIDIA's images, it is one distribution.
    for part in filter(None, (installed(_TE_CORES), installed((_TE_EXTENSION,)))):
        if version is not None and part[1] != version:
            raise UserError(*part, f"must be of transformer-engine's version, {version}", remedy)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except _BROKEN_IMPORT as error:
        constraint = f"does not import with torch {torch.__version__}: {_first_line(error)}"
        raise UserError("transformer-engine", version, constraint, remedy) from error


def _check_apex() -> None:
    """Without Transformer Engine Megatron takes its optimizer from apex where there is one."""
    modules = ["amp_C", "apex.optimizers"] if is_importable("apex") else []
    modules += [FUSED_GRADIENTS] if is_importable(FUSED_GRADIENTS) else []
    for module in modules:
        try:
            importlib.import_module(module)
        except _BROKEN_IMPORT as error:
            found = installed(("apex",))
            raise UserError(
                "apex",
                None if found is None else found[1],
                f"{module} does not import with torch {torch.__version__}: {_first_line(error)}",
                "build NVIDIA's apex with its C++ and CUDA extensions for this torch, or uninstall it",
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:160]
