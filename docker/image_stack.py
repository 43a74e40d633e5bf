"""Keeps what the base image holds: torch, and everything in it that was compiled against that torch.

Transformer Engine, apex, torchvision and flash-attn of the image link against the image's own torch build. pip
knows nothing of that: one requirement it prefers to meet from the package index replaces torch, and the others
break at import or, worse, later. So their versions become a pip constraint file before the first install, and are
compared with it after the last one. Standard library only: it runs before anything is installed.

    python -m pip list --format=freeze | python image_stack.py record CUDA_RELEASE > constraints.txt
    python image_stack.py verify constraints.txt
    python image_stack.py dependencies pyproject.toml > requirements.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

# torch itself, what is linked against it, and the compiler it was tested with.
_HELD = re.compile(
    r"(torch|torchvision|torchaudio|torchao|torch-tensorrt|triton|pytorch-triton|apex|transformer-engine.*|flash-attn.*)"
)
# The CUDA toolkit in wheels, which some requirement of vLLM brings beside the image's: Transformer Engine prefers
# its headers, vLLM's packages its compilers. Not nvidia-cuda-cccl, which has a numbering of its own.
_TOOLKIT = ("nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-nvvm")
# Without these a build would run for an hour before it fails.
_NEEDED = ("torch", "transformer-engine", "apex")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def canonical(name: str) -> str:
    """The name under which two spellings are one distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints_of(freeze: Iterable[str], cuda: str) -> list[str]:
    """The constraint lines for the lines of `pip list --format=freeze` and the toolkit's release ("13.3").

    Not of `pip freeze`: that writes `torch @ file:///...` for a wheel installed from a file, as the image's are,
    and a path is no constraint. Raises ValueError if torch, Transformer Engine or apex is not among them: then this
    is not an image to build on; or if the release is none.
    """
    if not re.fullmatch(r"\d+\.\d+", cuda):
        raise ValueError(
            f"CUDA release {cuda!r}: not a release such as 13.3; build on an image that has nvcc"
        )
    pins: dict[str, str] = {}
    for line in freeze:
        name, separator, version = line.strip().partition("==")
        if separator and _HELD.fullmatch(canonical(name)):
            pins[canonical(name)] = version
    for name in _NEEDED:
        if name not in pins:
            raise ValueError(f"{name}: not in the base image; build on one that holds it")
    held = [f"{name}=={version}" for name, version in sorted(pins.items())]
    return held + [f"{name}=={cuda}.*" for name in _TOOLKIT]


def read_constraints(path: Path) -> dict[str, str]:
    """Distribution to version of what the image held, from the lines of `constraints_of`."""
    pairs = (line.split("==", 1) for line in path.read_text().splitlines() if line.strip())
    return {name: version for name, version in pairs if not version.endswith(".*")}


def installed_versions() -> dict[str, str]:
    """Distribution to version; of two on sys.path the first, which is the one that imports."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(canonical(name), distribution.version)
    return versions


def changed(constraints: Mapping[str, str], versions: Mapping[str, str]) -> str | None:
    """The first distribution of the image that is not what it was, torch before all others; None if all are."""
    for name in sorted(constraints, key=lambda name: (name != "torch", name)):
        if versions.get(name) != constraints[name]:
            return (
                f"{name} = {versions.get(name, 'not installed')}: the image brought {constraints[name]}, and what "
                f"was compiled against it needs that very build; find the install that replaced it"
            )
    return None


def dependencies_of(pyproject: Mapping[str, object]) -> list[str]:
    """The requirements of the package without those that the image meets.

    torch must be left out rather than constrained: NVIDIA builds 2.13 as 2.13.0a0+..., which version rules sort
    below 2.13, so that `torch>=2.13` and the constraint exclude each other. self_check.py compares them instead.
    """
    project = pyproject["project"]
    assert isinstance(project, Mapping)
    wanted = []
    for requirement in project["dependencies"]:
        name = _NAME.match(requirement)
        if name is None or not _HELD.fullmatch(canonical(name[0])):
            wanted.append(requirement)
    return wanted


def main(arguments: list[str]) -> int:
    match arguments:
        case ["record", cuda]:
            try:
                print(*constraints_of(sys.stdin, cuda), sep="\n")
            except ValueError as error:
                print(f"image stack: {error}", file=sys.stderr)
                return 1
        case ["verify", path]:
            if problem := changed(read_constraints(Path(path)), installed_versions()):
                print(f"image stack: {problem}", file=sys.stderr)
                return 1
        case ["dependencies", path]:
            print(*dependencies_of(tomllib.loads(Path(path).read_text())), sep="\n")
        case _:
            print(
                "usage: image_stack.py record CUDA_RELEASE | verify CONSTRAINTS | dependencies PYPROJECT",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
