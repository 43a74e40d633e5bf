"""Makes a chosen call of a chosen function of a rank fail; first on PYTHONPATH of a job under test.

`SEAD_TEST_FAULT` is JSON: module, attribute ("Class.method" or "function"), call (counted from 1), rank, and action:
"kill" ends the launcher and all its ranks with SIGKILL before the call, "kill after" after it, and "raise" raises a
RuntimeError that says when. A module that torchrun's own process never imports is never patched there.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from job_mark import VARIABLE, is_marked, running_processes


def parent_of(process: int) -> int:
    """Parent id, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill_job() -> None:
    """The launcher first, so that nobody is told anything; this process last.

    Only this job's processes: a rank whose launcher is gone already is a child of init, and so are many others.
    """
    launcher, me = os.getppid(), os.getpid()
    token = os.environ[VARIABLE]
    if is_marked(launcher, token):
        children = [p for p in running_processes() if p != me and parent_of(p) == launcher]
        ranks = [p for p in children if is_marked(p, token)]
        for process in (launcher, *ranks):
            os.kill(process, signal.SIGKILL)
    os.kill(me, signal.SIGKILL)


def with_fault(function: Any, fault: dict[str, Any]) -> Any:
    """The function, failing at its n-th call."""
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != fault["call"]:
            return function(*args, **kwargs)
        if fault["action"] == "raise":
            raise RuntimeError(f"injected failure at {time.time():.1f}")
        if fault["action"] == "kill after":
            function(*args, **kwargs)
        kill_job()
        return None

    return faulty


class FaultFinder(importlib.machinery.PathFinder):
    """Imports as usual, and patches the fault's module once it is loaded."""

    fault: ClassVar[dict[str, Any]] = {}

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != cls.fault["module"]:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                *owner, name = cls.fault["attribute"].split(".")
                holder = getattr(module, owner[0]) if owner else module
                setattr(holder, name, with_fault(getattr(holder, name), cls.fault))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SEAD_TEST_FAULT" in os.environ:
    given = json.loads(os.environ["SEAD_TEST_FAULT"])
    if os.environ.get("RANK") == str(given["rank"]):
        FaultFinder.fault = given
        sys.meta_path.insert(0, FaultFinder)
