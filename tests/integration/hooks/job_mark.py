"""The mark that a test's job leaves in the environment of all its processes."""

from __future__ import annotations

from pathlib import Path

VARIABLE = "SEAD_TEST_JOB"


def is_marked(process: int, token: str) -> bool:
    """Whether a process was started by the job ``token``; False for one that is gone."""
    try:
        return f"{VARIABLE}={token}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def running_processes() -> list[int]:
    """Ids of all processes of the machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
