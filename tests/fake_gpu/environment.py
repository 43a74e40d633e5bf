"""The rehearsal's environments: the real GPU wheels, and a CUDA without a GPU for each of them.

    python tests/fake_gpu/environment.py DIR [--python312 PYTHON]

makes what is missing below DIR, some 20 GB: one virtual environment for each pair of vLLM and torch that is rehearsed,
Transformer Engine's torch extension (compiled once, about four minutes), and the fake CUDA of `cuda/`. A second call
does nothing. Needs a package index with the CUDA builds of torch, Python 3.12 with its headers, and g++.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED_GB = 25
TRANSFORMER_ENGINE = "2.20.2"


@dataclass(frozen=True)
class Pair:
    """A vLLM and the torch it is built for, with what else is rehearsed beside them."""

    name: str
    has_transformer_engine: bool

    @property
    def requirements(self) -> Path:
        """What pip installs."""
        return ROOT / "requirements" / f"rehearsal-{self.name}.txt"


PAIRS = (Pair("vllm-0.33", has_transformer_engine=True), Pair("vllm-0.32", has_transformer_engine=False))


@dataclass(frozen=True)
class Environment:
    """Where a pair lies."""

    pair: Pair
    directory: Path

    @property
    def python(self) -> Path:
        """The interpreter of the virtual environment."""
        return self.directory / "venv" / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Its packages."""
        return self.directory / "venv" / "lib" / "python3.12" / "site-packages"

    @property
    def cuda(self) -> Path:
        """The fake CUDA that was built for it; `env.sh` of this folder switches it on."""
        return self.directory / "cuda"

    @property
    def packages(self) -> Path:
        """A folder for PYTHONPATH that gives `sead_kernels` its name."""
        return self.directory / "packages"


def environments(directory: Path) -> dict[str, Environment]:
    """Every pair's environment, by its name."""
    return {pair.name: Environment(pair, directory / pair.name) for pair in PAIRS}


class MissingError(Exception):
    """Something that the rehearsal cannot make for itself."""


def _run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env=env)


def find_python(asked_for: str | None) -> str:
    """An interpreter of Python 3.12; the wheels of Transformer Engine's torch are built for it here."""
    pyenv = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.12.*/bin/python3.12")))
    for candidate in [asked_for] if asked_for else ["python3.12", *pyenv]:
        check = "import sys; assert sys.version_info[:2] == (3, 12)"
        try:
            subprocess.run([candidate, "-c", check], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    raise MissingError(
        f"no Python 3.12 ({asked_for or 'python3.12'}): name one with PYTHON312=/path/to/python3.12"
    )


def check_machine(directory: Path) -> None:
    """Raises MissingError for what a build would only find out after an hour."""
    if shutil.which("g++") is None:
        raise MissingError("no g++: install a C++ compiler (Debian: apt-get install g++)")
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free / 1e9
    if free < NEEDED_GB:
        raise MissingError(
            f"{free:.0f} GB are free in {directory}, {NEEDED_GB} are needed: name another REHEARSAL=DIR"
        )


def _mark_of(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _is_marked(marker: Path, mark: str) -> bool:
    return marker.exists() and marker.read_text() == mark


def install_wheels(environment: Environment, python: str) -> None:
    """The virtual environment, anew when its requirements have changed."""
    marker, mark = environment.directory / ".wheels", _mark_of(environment.pair.requirements)
    if _is_marked(marker, mark):
        return
    venv = environment.directory / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    _run(python, "-m", "venv", venv)
    _run(environment.python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    pip = (environment.python, "-m", "pip", "install", "--quiet", "--no-compile")
    _run(*pip, "--requirement", environment.pair.requirements)
    check_cuda_torch(environment)
    marker.write_text(mark)


def check_cuda_torch(environment: Environment) -> None:
    """Raises MissingError where the package index gave a CPU build of torch."""
    found = subprocess.run(
        [environment.python, "-c", "import torch; print(torch.__version__, torch.version.cuda)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    if found[-1] == "None":
        raise MissingError(
            f"torch {found[0]} is a CPU build: the rehearsal needs an index that has the CUDA build"
        )


def compile_transformer_engine(environment: Environment) -> None:
    """Transformer Engine's core library from its wheel, its torch extension from source."""
    script = HERE / "compile_transformer_engine.sh"
    marker, mark = (
        environment.directory / ".transformer_engine",
        _mark_of(script, environment.pair.requirements),
    )
    if _is_marked(marker, mark):
        return
    pip = (environment.python, "-m", "pip")
    version = f"=={TRANSFORMER_ENGINE}"
    names = ("transformer_engine", "transformer_engine_cu13")
    _run(*pip, "install", "--quiet", "--no-compile", "--no-deps", *(name + version for name in names))
    sources = environment.directory / "transformer_engine"
    sources.mkdir(exist_ok=True)
    # A source distribution only: its wheels need a compiler and a torch, which are both here.
    options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", sources)
    _run(*pip, "download", "--quiet", *options, f"transformer_engine_torch{version}")
    archive = sources / f"transformer_engine_torch-{TRANSFORMER_ENGINE}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    _run("bash", script, environment.python, archive.with_suffix("").with_suffix(""), sources / "objects")
    marker.write_text(mark)


def build_fake_cuda(environment: Environment) -> None:
    """The preloaded library; it is small, and built anew when a source has changed."""
    sources = sorted((HERE / "cuda").glob("*.*"))
    marker, mark = environment.directory / ".cuda", _mark_of(*sources)
    if not _is_marked(marker, mark):
        _run("bash", HERE / "cuda" / "build.sh", environment.cuda, environment.site_packages)
        marker.write_text(mark)
    names = environment.packages / "sead_kernels"
    names.mkdir(parents=True, exist_ok=True)
    link = names / "split_kl"
    if not link.exists():
        link.symlink_to(ROOT / "kernels" / "split_kl")


def build(directory: Path, python312: str | None) -> None:
    """Makes what is missing."""
    check_machine(directory)
    python = find_python(python312)
    for environment in environments(directory).values():
        install_wheels(environment, python)
        if environment.pair.has_transformer_engine:
            compile_transformer_engine(environment)
        build_fake_cuda(environment)


def main() -> int:
    """The command line; one line and exit code 2 for what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python312", help="an interpreter of Python 3.12; looked for by default")
    options = parser.parse_args()
    try:
        build(options.directory.absolute(), options.python312 or None)
    except MissingError as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"rehearsal: {error.cmd[0]} failed with exit code {error.returncode}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
