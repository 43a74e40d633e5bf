"""A world whose ranks cannot reach each other ends with a message before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launch import run_ranks


def test_reachable_and_not(tmp_path: Path) -> None:
    assert run_ranks("unreachable", 2, tmp_path, silent=False) == "reached"
    assert run_ranks("unreachable", 2, tmp_path, silent=True, timeout=60) == (
        'network = "2 ranks over gloo": the first all-reduce did not come back within 2 s (Operation timed out!); set '
        "GLOO_SOCKET_IFNAME to an interface that all nodes share, and look for a rank that did not start"
    )
