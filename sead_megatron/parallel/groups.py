"""Process groups of two models over the same ranks.

The student's groups are also registered with Megatron's `parallel_state`, because a few places inside
Megatron-core still read it when no group is passed. The teacher exists only as a `ProcessGroupCollection`.
Nothing outside this package reads `parallel_state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from sead_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class ParallelGroups:
    """One model's layout, this rank's place in it and its process groups."""

    layout: Layout
    rank: int
    collection: ProcessGroupCollection

    @property
    def tp_rank(self) -> int:
        """This rank's tensor-parallel index."""
        return self.layout.tp_rank(self.rank)

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.layout.pp_rank(self.rank)

    @property
    def dp_rank(self) -> int:
        """The replica of the model that this rank is part of."""
        return self.layout.dp_rank(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """True on ranks that hold the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on ranks that hold the final norm and the output layer."""
        return self.pp_rank == self.layout.pipeline - 1


def group_of_this_rank(rank_lists: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Creates every group of a partition of the world (a collective) and returns the one with this rank."""
    mine: dist.ProcessGroup | None = None
    for ranks in rank_lists:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    if mine is None:
        raise ValueError(f"rank {dist.get_rank()} is in none of the groups {rank_lists}")
    return mine


def student_groups(layout: Layout) -> ParallelGroups:
    """Groups of the trained model. Model-parallel blocks are contiguous ranks, hence the order tp-pp-dp."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        order="tp-cp-ep-pp-dp",
        create_gloo_process_groups=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    # Asked for by DDP and the optimizer, yet not filled in by use_mpu_process_groups in every version.
    collection.dp = parallel_state.get_data_parallel_group()
    collection.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    collection.intra_dist_opt = parallel_state.get_intra_distributed_optimizer_instance_group()
    groups = ParallelGroups(layout, dist.get_rank(), collection)
    expected = (groups.tp_rank, groups.pp_rank, groups.dp_rank)
    actual = (collection.tp.rank(), collection.pp.rank(), collection.dp.rank())
    if expected != actual:
        raise RuntimeError(f"Megatron placed this rank at (tp, pp, dp) {actual}, the layout says {expected}")
    return groups


def teacher_groups(layout: Layout) -> ParallelGroups:
    """Groups of the frozen model, unknown to `parallel_state`."""
    rank = dist.get_rank()
    alone = group_of_this_rank([[r] for r in range(layout.world)])
    collection = ProcessGroupCollection()
    collection.tp = group_of_this_rank(layout.tensor_groups())
    collection.pp = group_of_this_rank(layout.pipeline_groups())
    collection.dp = collection.dp_cp = collection.expt_dp = group_of_this_rank(layout.data_groups())
    collection.mp = collection.tp_ep_pp = group_of_this_rank(layout.block_groups())
    collection.cp = collection.ep = alone
    collection.tp_cp = collection.expt_tp = collection.tp_ep = collection.tp
    collection.embd = collection.pos_embd = collection.hcp = None
    return ParallelGroups(layout, rank, collection)


def destroy_groups() -> None:
    """Destroys every group but the world's (tests build several layouts in one process).

    Megatron only forgets its groups: the connections and threads of gloo groups stay and pile up.
    """
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
