"""Does this image hold together? Versions first, then imports; the first thing that is wrong, in one line.

Run at the end of the build, where a wrong pin costs minutes rather than a job, and again on a machine with a GPU:
without a driver Transformer Engine cannot be imported (it loads libcuda), so that the build can only say so.

    python self_check.py            # everything must import
    python self_check.py --build    # an import that fails for want of a driver is reported and deferred
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent))
from image_stack import canonical, changed, installed_versions, read_constraints

PYTHON = (3, 12)

# Distribution to the modules that must import, in the order in which one needs the other.
STACK: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformer-engine": ("transformer_engine.pytorch",),
    "apex": ("apex",),
    "vllm": ("vllm", "vllm._C_stable_libtorch"),
    "megatron-core": ("megatron.core",),
    "sead-megatron": ("sead_megatron", "sead_kernels.split_kl"),
}

# The torch that each vLLM release is written for (torch== in its requirements). The build strips that requirement,
# so nothing else would notice a base image of another torch.
VLLM_TORCH = {"0.32": "2.13", "0.33": "2.14"}

# Below it a frozen FP8 model keeps a transposed copy of its weights (sead_megatron.preflight.TRANSFORMER_ENGINE).
TRANSFORMER_ENGINE = "2.6"

_NO_DRIVER = re.compile(
    r"libcuda\.so|libnvidia-ml\.so|no NVIDIA driver|No CUDA GPUs are available|CUDA driver version is insufficient",
    re.IGNORECASE,
)


def released(version: str) -> Version:
    """The release that a build leads to: 2.13.0 for NVIDIA's 2.13.0a0+9186a08b2c.nv26.7.

    A requirement is compared with this, since an alpha sorts below its release and the name says "alpha" of a
    build that NVIDIA ships as final.
    """
    return Version(Version(version).base_version)


def minor(version: str) -> str:
    return ".".join(str(number) for number in released(version).release[:2])


def missing(versions: Mapping[str, str]) -> str | None:
    """The first distribution of STACK that is not installed."""
    for name, modules in STACK.items():
        if name not in versions:
            return f"{modules[0].partition('.')[0]}: not installed; use the image that the Dockerfile builds"
    return None


def unmet(requirements: Iterable[str], versions: Mapping[str, str]) -> str | None:
    """The first of our requirements that does not hold: `--no-deps` installs us without asking.

    `requirements`: as `importlib.metadata.requires` gives them; those of the extra `gpu` count.
    """
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "gpu"}):
            continue
        found = versions.get(canonical(requirement.name))
        if found is None:
            return f"{requirement.name}: not installed; sead_megatron needs {requirement.specifier}"
        version = released(found) if canonical(requirement.name) == "torch" else Version(found)
        if not requirement.specifier.contains(version, prereleases=True):
            return f"{requirement.name} = {found}: sead_megatron needs {requirement.specifier}"
    return None


def mismatched(versions: Mapping[str, str]) -> str | None:
    """The first pair of versions that were not made for each other."""
    vllm, torch = versions["vllm"], versions["torch"]
    written_for = VLLM_TORCH.get(minor(vllm))
    if written_for is None:
        return (
            f"vllm = {vllm}: the torch it is written for is not known; look it up (torch== in its requirements) "
            "and add it to VLLM_TORCH in docker/self_check.py"
        )
    if minor(torch) != written_for:
        return f"vllm = {vllm}: written for torch {written_for}, but torch is {torch}; change one of the two"
    engine = versions["transformer-engine"]
    if released(engine) < Version(TRANSFORMER_ENGINE):
        return f"transformer_engine = {engine}: must be at least {TRANSFORMER_ENGINE}; use a newer base image"
    return None


def wrong_versions(
    versions: Mapping[str, str],
    constraints: Mapping[str, str] | None,
    requirements: Iterable[str],
    python: tuple[int, int],
) -> str | None:
    """The first thing that installed versions show to be wrong. Nothing is imported.

    `constraints`: what the image held before the first install; None where no image recorded it.
    """
    if problem := missing(versions):
        return problem
    if constraints is None:
        return "PIP_CONSTRAINT: names no file, so torch may have been replaced; use the Dockerfile"
    if problem := changed(constraints, versions):
        return problem
    if python != PYTHON:
        return f"python = {python[0]}.{python[1]}: the image is made for {PYTHON[0]}.{PYTHON[1]}"
    return unmet(requirements, versions) or mismatched(versions)


def wrong_torch(installed: str, imported: str, cuda: str | None) -> str | None:
    """Is the torch that imports the installed one, and built for CUDA?

    A checkout or a user site directory earlier on sys.path hides the image's. NVIDIA's distribution version is the
    module's with a build number behind it: 2.13.0a0+9186a08b2c.nv26.7.59513937 and 2.13.0a0+9186a08b2c.nv26.07.
    """
    wanted, found = Version(installed), Version(imported)
    same_build = wanted.public == found.public and f"{wanted.local}.".startswith(f"{found.local}.")
    if not same_build:
        return f"torch = {imported}: installed is {installed}, so another torch comes first on sys.path; remove it"
    if cuda is None:
        return f"torch = {imported}: built without CUDA; use the torch of the base image"
    return None


def failed_import(module: str, error: BaseException) -> str:
    """One line for an import that failed, with the likely cause where a linker message hides it."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if "undefined symbol" in said:
        said = f"compiled against another torch ({said}); build it again in this image"
    return f"{module}: {said}"


def import_all(
    modules: Iterable[str], load: Callable[[str], ModuleType], *, build: bool
) -> tuple[list[str], str | None]:
    """Imports each module in turn; the ones that only a missing driver stopped, and the first real failure.

    `build`: whether a missing driver is expected. Elsewhere it is a failure like any other.
    """
    deferred: list[str] = []
    for module in modules:
        try:
            load(module)
        # Not ImportError alone: Transformer Engine and CUDA libraries raise OSError, RuntimeError and AssertionError.
        except Exception as error:
            if not (build and _NO_DRIVER.search(str(error))):
                return deferred, failed_import(module, error)
            deferred.append(module)
    return deferred, None


def report(versions: Mapping[str, str], constraints: Mapping[str, str]) -> list[str]:
    """Name and version of everything whose versions were compared."""
    names = dict.fromkeys([*STACK, *constraints, "transformers", "flashinfer-python"])
    return [f"{name:<20} {versions[name]}" for name in names if name in versions]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", action="store_true", help="this machine has no NVIDIA driver")
    parser.add_argument(
        "--constraints", default=os.environ.get("PIP_CONSTRAINT", ""), help="written by image_stack.py"
    )
    options = parser.parse_args(arguments)

    versions = installed_versions()
    path = Path(options.constraints)
    constraints = read_constraints(path) if options.constraints and path.is_file() else None
    requirements = (metadata.requires("sead_megatron") or []) if "sead-megatron" in versions else []
    problem = wrong_versions(versions, constraints, requirements, sys.version_info[:2])
    deferred: list[str] = []
    if problem is None:
        print(*report(versions, constraints or {}), sep="\n")
        modules = [module for group in STACK.values() for module in group]
        deferred, problem = import_all(modules, importlib.import_module, build=options.build)
    if problem is None:
        torch = importlib.import_module("torch")
        problem = wrong_torch(versions["torch"], torch.__version__, torch.version.cuda)
    if problem is not None:
        print(f"self-check failed: {problem}", file=sys.stderr)
        return 1
    for module in deferred:
        print(f"deferred: {module} needs an NVIDIA driver; run this check again on a machine with a GPU")
    print("self-check passed" + (" as far as it can without a driver" if deferred else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
