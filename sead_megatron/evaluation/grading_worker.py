"""Grades in a process of its own: `python -m sead_megatron.evaluation.grading_worker PARENT CPU_SECONDS MEMORY_MIB`.

Requests come on standard input, replies go to standard output: 4 bytes big-endian length, then JSON. The first reply
is "ready"; then every request `[response, answer]` is answered by true or false. No limit relies on Python: the kernel
ends this process when an answer has used `CPU_SECONDS` of processor time (SIGPROF, so a loop in C ends as well),
refuses memory beyond `MEMORY_MIB`, and kills it when the parent dies. `grader.Grader` is the other side.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

HEADER = struct.Struct("!I")
READY = "ready"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def encode(message: object) -> bytes:
    """One message; lone surrogates, which a decoded response can hold, survive as escapes."""
    text = json.dumps(message).encode("ascii")
    return HEADER.pack(len(text)) + text


def read_message(stream: BinaryIO) -> Any:
    """The next message, or None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    text = stream.read(length)
    return json.loads(text) if len(text) == length else None


def _die_with(parent: int) -> None:
    """End of input says so too, but not to a busy process, nor while a sibling holds a copy of the pipe."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _set_limits(memory_mib: int) -> None:
    """Memory, and no files: nothing that an answer brings may write one."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _memory_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 20


def main(arguments: list[str]) -> None:
    """Serves until its input ends. An exception ends the process: the parent counts it and starts another."""
    parent, cpu_seconds, memory_mib = int(arguments[0]), float(arguments[1]), int(arguments[2])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the whole job
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Whatever a library prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    # Takes a second; the parent does not need it.
    from sead_megatron.evaluation.grading import grade, warm_up

    warm_up()
    _set_limits(memory_mib)
    replies.write(encode(READY))
    os.dup2(nowhere, 2)
    while (request := read_message(sys.stdin.buffer)) is not None:
        response, answer = request
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict = grade(response, answer)
        except (MemoryError, RecursionError):
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(encode(verdict))
        # Caches have grown: rather a new process than honest answers that find no memory.
        if _memory_mib() > memory_mib // 2:
            break


if __name__ == "__main__":
    main(sys.argv[1:])
