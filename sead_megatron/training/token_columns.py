"""Per-token statistics of the global batch, put together from the ranks that measured them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sead_megatron.parallel.groups import ParallelGroups


def share_columns(
    names: tuple[str, ...],
    measured: Mapping[str, Tensor],
    token_index: Tensor | None,
    num_tokens: int,
    groups: ParallelGroups,
    device: torch.device,
) -> dict[str, Tensor]:
    """Columns float32 [num_tokens] that are equal on every rank of the world (a collective over it).

    Each token is measured by one student replica: by the TP ranks of its last stage, of which the first contributes.
    A token that nobody measured is 0. The sum adds zeros only, so values arrive bit for bit.

    Args:
        measured: this rank's columns, [len(token_index)] each; read on contributing ranks only.
        token_index: their indices in the TokenTable, on `device`.
    """
    table = torch.zeros(len(names), num_tokens, dtype=torch.float32, device=device)
    if groups.is_last_stage and groups.tp_rank == 0 and token_index is not None and len(token_index):
        columns = torch.stack([measured[name].detach().float() for name in names])
        table[:, token_index] = columns
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))
