"""One process that plays one rank of a large world, on a fake GPU.

Groups are as large as in the real world; NCCL takes every other rank's data to be this rank's (`FAKE_NCCL=alone`), and
what is agreed on through the store is what this rank says.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_ID_BYTES = 128


class _LonelyStore(dist.Store):
    """A store in which whatever another rank should have written is there: NCCL's id, which rank 0 makes."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str) -> bytes:
        return self._values.get(key, b"1" * _ID_BYTES)

    def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        return True

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        return None

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        return None


def play_rank(rank: int, world: int, per_node: int = 8) -> None:
    """Makes this process rank `rank` of `world`; before anything reads torchrun's variables."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "FAKE_NCCL": "alone",
    }
    real_init, real_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **options: Any) -> None:
        options.pop("init_method", None)
        real_init(backend, store=_LonelyStore(), rank=rank, world_size=world, **options)

    def new_group(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        members = list(range(world)) if ranks is None else list(ranks)
        os.environ["FAKE_SPLIT_RANKS"] = str(len(members))
        os.environ["FAKE_SPLIT_RANK"] = str(members.index(rank) if rank in members else 0)
        return real_group(ranks, *arguments, **options)

    dist.init_process_group = init_process_group
    dist.new_group = dist.distributed_c10d.new_group = new_group
    # It counts the ranks that have arrived; the others never do.
    dist.distributed_c10d._store_based_barrier = lambda *arguments, **options: None
