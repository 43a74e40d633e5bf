"""Grades answers in a worker process that may be killed at any time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from sead_megatron.evaluation.grading_worker import HEADER, READY, encode

# Processor time of an answer.
CPU_SECONDS = 4.0
# Of an answer whose worker neither computes nor replies.
WALL_SECONDS = 60.0
# Address space of the worker; imports and caches take 300 MiB.
MEMORY_MIB = 2048
# Imports from a cold network file system by every rank at once.
_START_SECONDS = 600.0
# What torchrun tells a rank about its world; the worker is no part of it.
_DISTRIBUTED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")


class Grader:
    """A context that grades in one worker process, restarted after an answer has killed it.

    The worker is a new program, not a fork: it holds neither torch nor the sockets, threads and devices of this
    process, and ends with it, however it ends. Create it on the thread that uses it: the kernel ends the worker with
    the thread that started it. An answer that takes too long, or brings the worker down, is wrong.

    Attributes:
        timeouts: answers stopped by a time limit since the last `take_counts`.
        crashes: answers at which the worker died otherwise.
    """

    def __init__(
        self,
        *,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        self.timeouts = 0
        self.crashes = 0
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds
        self._memory_mib = memory_mib
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def __enter__(self) -> Self:
        self._start()  # it imports while this process goes on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def grade_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (response, gold answer) pair agrees (`grading.grade`), in order.

        Raises RuntimeError when a worker cannot be started at all.
        """
        return [self._grade(response, answer) for response, answer in pairs]

    def take_counts(self) -> tuple[int, int]:
        """(timeouts, crashes) since the last call."""
        counts = self.timeouts, self.crashes
        self.timeouts = self.crashes = 0
        return counts

    @property
    def worker_id(self) -> int | None:
        """Process id of the worker, None without one."""
        return None if self._worker is None else self._worker.pid

    def _grade(self, response: str, answer: str) -> bool:
        self._make_ready()
        try:
            return bool(self._exchange(encode([response, answer]), self._wall_seconds))
        except TimeoutError:
            self._end()
            self.timeouts += 1
        except (EOFError, BrokenPipeError):
            if self._end() == -signal.SIGPROF:
                self.timeouts += 1
            else:
                self.crashes += 1
        return False

    def _start(self) -> None:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith((*_DISTRIBUTED, "TORCHELASTIC_"))
        }
        # The order of sets of symbols decides what sympy tries first.
        environment["PYTHONHASHSEED"] = "0"
        limits = (str(os.getpid()), str(self._cpu_seconds), str(self._memory_mib))
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "sead_megatron.evaluation.grading_worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        assert self._worker.stdin is not None
        os.set_blocking(self._worker.stdin.fileno(), False)
        self._is_ready = False

    def _make_ready(self) -> None:
        """A worker that waits for a request; one that died while it was idle is nobody's fault."""
        if self._worker is not None and self._worker.poll() is not None:
            self._end()
        if self._worker is None:
            self._start()
        if not self._is_ready:
            try:
                self._is_ready = self._exchange(b"", _START_SECONDS) == READY
            except (EOFError, TimeoutError) as error:
                code = self._end()
                raise RuntimeError(f"the grading worker did not start (exit code {code})") from error

    def _end(self) -> int:
        """Kills the worker, if it still lives; how it ended."""
        worker, self._worker = self._worker, None
        if worker is None:
            return 0
        worker.kill()
        code = worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def _exchange(self, request: bytes, seconds: float) -> Any:
        """Sends a request, unless it is empty, and returns the reply.

        Raises TimeoutError when neither moves within `seconds`; EOFError or BrokenPipeError when the worker is gone.
        """
        assert self._worker is not None and self._worker.stdin is not None and self._worker.stdout is not None
        deadline = time.monotonic() + seconds
        unsent, received = memoryview(request), b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._worker.stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(self._worker.stdin, selectors.EVENT_WRITE)
            while True:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError
                for key, mask in events:
                    if mask & selectors.EVENT_WRITE:
                        unsent = unsent[os.write(key.fd, unsent) :]
                        if not unsent:
                            selector.unregister(self._worker.stdin)
                    else:
                        part = os.read(key.fd, 4096)
                        if not part:
                            raise EOFError
                        received += part
                if len(received) >= HEADER.size:
                    end = HEADER.size + HEADER.unpack(received[: HEADER.size])[0]
                    if len(received) == end:
                        return json.loads(received[HEADER.size :])
