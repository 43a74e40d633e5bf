"""Builds the native tile kernels when they are first needed, and keeps them.

One shared library per (source, flags, processor), in ``$SEAD_KERNELS_CACHE`` or
``~/.cache/sead_megatron/kernels``. Ranks that start together wait for one of them; a library appears by a
rename, so an interrupted build leaves nothing to load. Libraries have a plain C interface (raw pointers,
strides, a stream) and are loaded with ctypes: they depend on no version of torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
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


def find_program(variable: str, *names: str) -> list[str] | None:
    """The command in environment variable ``variable`` (a program, perhaps with arguments), else one of ``names``."""
    wanted = os.environ.get(variable)
    for command in [shlex.split(wanted)] if wanted else [[name] for name in names]:
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    return None


def build_library(
    compiler: Sequence[str] | None,
    flags: Sequence[str],
    sources: Sequence[Path],
    *,
    missing: str,
    key: str = "",
    timeout: float = 600,
) -> Path:
    """The library made by ``compiler flags sources[0] -o``; the other sources are headers it includes.

    Args:
        compiler: None if there is none: a library that is there already is enough.
        missing: the error where there is neither; what to install.
        key: whatever else the result depends on, such as the processor under ``-march=native``.

    Raises:
        BuildError: no compiler, a failure of it, or a cache directory that is not writable.
    """
    parts = [source.read_bytes() for source in sources] + [text.encode() for text in (key, *flags)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    try:
        library = cache_directory() / f"{sources[0].stem}-{digest}.so"
        if not library.exists():
            if compiler is None:
                raise BuildError(missing)
            with open(library.with_suffix(".lock"), "w") as lock:
                # Some network file systems cannot lock: then several ranks build, and the last rename wins.
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    _compile(compiler, flags, sources[0], library, timeout)
    except OSError as error:
        raise BuildError(f"{error} (set SEAD_KERNELS_CACHE to a writable directory)") from error
    return library


def _compile(
    compiler: Sequence[str], flags: Sequence[str], source: Path, library: Path, timeout: float
) -> None:
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".partial")
    os.close(handle)
    try:
        command = [*compiler, *flags, str(source), "-o", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {timeout:.0f} s") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise BuildError(f"{' '.join(command)} failed: {errors[0] if errors else done.returncode}")
        os.chmod(name, 0o755)  # mkstemp's 0600 would lock other users of a shared cache out
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
