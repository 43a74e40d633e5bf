"""A rank that passed the rendezvous and then answers nobody."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import rank
import torch
import torch.distributed as dist


def body(silent: bool) -> None:
    """Rank 0 reports what `check_reachable` says. Nobody waits for the other at the end."""
    from sead_megatron.errors import UserError
    from sead_megatron.training.job import check_reachable

    said = "reached"
    if dist.get_rank() == 1 and silent:
        time.sleep(5)
        os._exit(0)
    try:
        check_reachable(torch.device("cpu"), timedelta(seconds=2))
    except UserError as error:
        said = str(error)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(said))
    os._exit(0)


if __name__ == "__main__":
    rank.run(body)
