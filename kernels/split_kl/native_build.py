"""Builds the native tile kernels when they are first needed, and keeps them.

One shared library per (source, compiler, flags, processor), in ``$SEAD_KERNELS_CACHE`` or
``~/.cache/sead_megatron/kernels``. Ranks that start together wait for one of them; a library appears by a
rename, so an interrupted build leaves nothing to load. Libraries have a plain C interface (raw pointers,
strides, a stream) and are loaded with ctypes: they depend on no version of torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class BuildError(RuntimeError):
    """What the compiler said."""


def cache_directory() -> Path:
    """Where built libraries lie; created if need be."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sead_megatron" / "kernels"
    directory = Path(os.environ.get("SEAD_KERNELS_CACHE") or default)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def find_program(variable: str, *names: str) -> str | None:
    """Absolute path of the program in environment variable ``variable``, else of the first of ``names``."""
    wanted = os.environ.get(variable)
    for name in [wanted] if wanted else names:
        path = shutil.which(name)
        if path:
            return path
    return None


def build_library(
    compiler: str, flags: Sequence[str], sources: Sequence[Path], *, key: str = "", timeout: float = 600
) -> Path:
    """The library made by ``compiler flags sources[0] -o``; the other sources are headers it includes.

    Args:
        key: whatever else the result depends on, such as the processor under ``-march=native``.

    Raises:
        BuildError: the compiler failed or the cache directory is not writable.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [source.read_bytes() for source in sources]
    parts += [text.encode() for text in (compiler, version, key, *flags)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    try:
        library = cache_directory() / f"{sources[0].stem}-{digest}.so"
        if not library.exists():
            with open(library.with_suffix(".lock"), "w") as lock:
                # Some network file systems cannot lock: then several ranks build, and the last rename wins.
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    _compile(compiler, flags, sources[0], library, timeout)
    except OSError as error:
        raise BuildError(f"{error} (set SEAD_KERNELS_CACHE to a writable directory)") from error
    return library


def _compile(compiler: str, flags: Sequence[str], source: Path, library: Path, timeout: float) -> None:
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".partial")
    os.close(handle)
    try:
        command = [compiler, *flags, str(source), "-o", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took more than {timeout:.0f} s") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise BuildError(f"{' '.join(command)} failed: {errors[0] if errors else done.returncode}")
        os.chmod(name, 0o755)  # mkstemp's 0600 would lock other users of a shared cache out
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
