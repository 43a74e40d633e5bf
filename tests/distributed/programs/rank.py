"""What every program does first and last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(body: Callable[..., Any], redirect: bool = True) -> None:
    """Joins the gloo world, calls `body(**arguments)` and writes rank 0's return value.

    `redirect`: torch.cuda to the CPU before that; a body that starts an engine does it itself, afterwards.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if redirect:
        from sead_megatron.parallel import megatron_on_cpu

        megatron_on_cpu.install()
    result = body(**json.loads(Path(sys.argv[1]).read_text()))
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
