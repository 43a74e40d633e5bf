"""Ranks become a world, or say in bounded time that they cannot, before anything is loaded."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from sead_megatron.background import Background
from sead_megatron.errors import UserError

# Longer than the slowest collective of a healthy run (waiting for the longest rollout), short enough to end a dead one.
_COLLECTIVE_TIMEOUT = timedelta(minutes=60)

# Of ranks that torchrun starts together, until the last one has imported everything and all are connected.
_CONNECTION_TIMEOUT = timedelta(minutes=10)

# Of ranks that are connected and have loaded nothing yet.
_FIRST_COLLECTIVE_TIMEOUT = timedelta(minutes=5)


def connect(
    backend: str, device: torch.device | None = None, timeout: timedelta = _CONNECTION_TIMEOUT
) -> None:
    """Makes the process group of the world. Raises UserError when that fails, or is not done in time.

    Neither backend ends by itself in time: both wait for a rank that does not come for as long as for any collective,
    and NCCL, which connects all ranks in here (`device_id` lets it; the groups of the models are then split from these
    connections), tries an unreachable address again and again. Its non-blocking mode has a timeout of its own, but
    since 2.7.1 torch does not choose it by itself, because it hung (pytorch issue 153960). So the main thread waits
    for another one, which is left to its fate: it holds no lock of the interpreter while it connects. Seen to end in
    time with gloo; not run with NCCL on a network.
    """

    def make() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # of this thread
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT, device_id=device)

    connecting = Background(make, "connect")
    if not connecting.ends_within(timeout.total_seconds()):
        raise _unreachable(backend, f"not connected within {timeout.total_seconds():g} s")
    try:
        connecting.result()
    except RuntimeError as error:
        # What torch says of the network is a RuntimeError; anything else is a fault.
        raise _unreachable(backend, f"not connected ({_reason(error)})") from error


def check_reachable(device: torch.device, timeout: timedelta = _FIRST_COLLECTIVE_TIMEOUT) -> None:
    """A first all-reduce over the world, before anything is loaded.

    Raises UserError when it does not come back in time: ranks that met at the rendezvous may still be unable to reach
    each other over the network interface that the backend chose.
    """
    backend = dist.get_backend()
    count = torch.ones(1, device=device)
    try:
        work = dist.all_reduce(count, async_op=True)
        work.wait(timeout)
        arrived = int(count)
    except RuntimeError as error:
        waited = f"within {timeout.total_seconds():g} s ({_reason(error)})"
        raise _unreachable(backend, f"the first all-reduce did not come back {waited}") from error
    if arrived != dist.get_world_size():
        raise RuntimeError(f"an all-reduce of ones over {dist.get_world_size()} ranks gave {arrived}")


def _unreachable(backend: str, what_happened: str) -> UserError:
    interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    return UserError(
        "network",
        f"{os.environ['WORLD_SIZE']} ranks over {backend}",
        what_happened,
        f"set {interface} to an interface that all nodes share, and look for a rank that did not start",
    )


def _reason(error: Exception) -> str:
    """The line of an error that says most: NCCL's own, which torch puts last."""
    lines = str(error).strip().split("\n")
    said = "Last error:"
    return (lines[lines.index(said) + 1] if said in lines[:-1] else lines[0])[:200]
