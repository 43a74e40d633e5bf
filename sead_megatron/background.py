"""One call beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class Background(Generic[_Result]):
    """One call in a thread of its own, which dies with the process: a rank that fails must not wait for it."""

    def __init__(self, call: Callable[[], _Result], name: str) -> None:
        """`name`: the thread's, in stack dumps."""
        self._outcome: _Result | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], _Result]) -> None:
        try:
            self._outcome = call()
        except BaseException as error:  # Raised again in the thread that asks for the result.
            self._outcome = error

    @property
    def is_done(self) -> bool:
        """Whether `result` comes back at once."""
        return not self._thread.is_alive()

    def ends_within(self, seconds: float) -> bool:
        """Waits at most so long; whether the call has ended."""
        self._thread.join(seconds)
        return self.is_done

    def result(self) -> _Result:
        """What the call returned, waiting for it; raises what it raised."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome  # type: ignore[return-value]
