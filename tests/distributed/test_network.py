"""A world whose ranks cannot reach each other ends with a message before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from sead_megatron.parallel import network
from tests.distributed.launch import run_ranks

WORLD = 'network = "2 ranks over gloo"'
REMEDY = "set GLOO_SOCKET_IFNAME to an interface that all nodes share, and look for a rank that did not start"


def test_reachable_and_not(tmp_path: Path) -> None:
    def said(case: str) -> str:
        return run_ranks("unreachable", 2, tmp_path, case=case, timeout=120)

    assert said("reached") == "reached"
    assert said("silent") == (
        f"{WORLD}: the first all-reduce did not come back within 2 s (Operation timed out!); {REMEDY}"
    )
    assert said("absent") == f"{WORLD}: not connected within 2 s; {REMEDY}"
    without = said("interface nowhere0")
    assert without.startswith(f"{WORLD}: not connected (") and "nowhere0" in without
    assert without.endswith(f"; {REMEDY}")


def test_what_nccl_says_is_shown() -> None:
    """Of an error as torch raises it: the place and NCCL's version first, the reason last."""
    error = RuntimeError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, remote process exited or there was a "
        "network error, NCCL version 2.30.7\nncclRemoteError: A call failed possibly due to a network error.\n"
        "Last error:\nsocketPollConnect: connect to 10.0.0.2<41357> returned Connection refused\n"
    )
    assert (
        network._reason(error) == "socketPollConnect: connect to 10.0.0.2<41357> returned Connection refused"
    )
    assert network._reason(RuntimeError("Operation timed out!\nmore")) == "Operation timed out!"
