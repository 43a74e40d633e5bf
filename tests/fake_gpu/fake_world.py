"""One process that plays one rank of a large world, on a fake GPU.

Groups are as large as in the real world; NCCL takes every other rank's data to be this rank's (`FAKE_NCCL=alone`), and
what is agreed on through the store is what this rank says.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


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
        real_init(backend, store=dist.HashStore(), rank=rank, world_size=world, **options)

    def new_group(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        members = list(range(world)) if ranks is None else list(ranks)
        os.environ["FAKE_SPLIT_RANKS"] = str(len(members))
        os.environ["FAKE_SPLIT_RANK"] = str(members.index(rank) if rank in members else 0)
        return real_group(ranks, *arguments, **options)

    dist.init_process_group = init_process_group
    dist.new_group = dist.distributed_c10d.new_group = new_group
    # It counts the ranks that have arrived; the others never do.
    dist.distributed_c10d._store_based_barrier = lambda *arguments, **options: None
