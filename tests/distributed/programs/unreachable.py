"""Ranks that torchrun started and that do not reach each other, before and after they are a world.

`case`: "reached"; "absent" (rank 1 never joins); "silent" (it joins and then answers nobody); or "interface NAME", over
which the ranks are to talk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch


def main(case: str) -> None:
    """Rank 0 reports what is said. Nobody waits for the other at the end."""
    from sead_megatron.errors import UserError
    from sead_megatron.parallel.network import check_reachable, connect

    if case.startswith("interface "):
        os.environ["GLOO_SOCKET_IFNAME"] = case.removeprefix("interface ")
    is_other = os.environ["RANK"] == "1"
    if is_other and case == "absent":
        time.sleep(5)
        os._exit(0)
    said = "reached"
    try:
        connect("gloo", timeout=timedelta(seconds=2 if case == "absent" else 60))
        if is_other and case == "silent":
            time.sleep(5)
            os._exit(0)
        check_reachable(torch.device("cpu"), timedelta(seconds=2))
    except UserError as error:
        said = str(error)
    if not is_other:
        Path(sys.argv[2]).write_text(json.dumps(said))
    os._exit(0)


if __name__ == "__main__":
    main(**json.loads(Path(sys.argv[1]).read_text()))
