"""Runs rows through a model with Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from sead_megatron.data.packing import PackedRow
from sead_megatron.parallel.groups import ParallelGroups

Row = TypeVar("Row", bound=PackedRow)

ForwardStep = Callable[[Iterator[Row], Any], tuple[Tensor, Callable[..., Any]]]


def forward_row(model: Any, row: PackedRow) -> Tensor:
    """The model's hidden states of one packed row, [S, 1, H] ([S / TP, 1, H] under sequence parallelism).

    The row is on the model's device.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=row.cu_seqlens,
        cu_seqlens_kv=row.cu_seqlens,
        max_seqlen_q=row.max_seqlen,
        max_seqlen_kv=row.max_seqlen,
    )
    return model(row.tokens, row.position_ids, None, packed_seq_params=packed)


def response_rows(hidden: Tensor, row: PackedRow, groups: ParallelGroups, sequence_parallel: bool) -> Tensor:
    """Hidden states that predict the row's response tokens, [R, H], equal on all TP ranks.

    The gradient that comes back is each TP rank's part (its vocabulary shard's); it is summed over the TP group here.
    """
    group = groups.collection.tp
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return hidden[:, 0].index_select(0, row.logit_rows)


def run_rows(
    model: torch.nn.Module,
    groups: ParallelGroups,
    rows: Sequence[Row],
    forward_step: ForwardStep[Row],
    *,
    train: bool,
) -> list[Any]:
    """Forward (and backward, when `train`) over all rows; returns what the loss functions gave, on the last stage.

    With `train=False` each loss function is called with `non_loss_data=True` and its value is collected as it is.
    """
    pipelined = groups.layout.pipeline > 1
    schedule = (
        forward_backward_pipelining_without_interleaving if pipelined else forward_backward_no_pipelining
    )
    config = model.config
    communicator = P2PCommunicator(groups.collection.pp, config) if pipelined else None
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        seq_length=max(row.tokens.shape[1] for row in rows),
        micro_batch_size=1,
        forward_only=not train,
        collect_non_loss_data=not train,
        p2p_communicator=communicator,
        pg_collection=groups.collection,
    )
