"""Rank arithmetic of one model's layout over the world: no torch, no process group.

Ranks are numbered with the tensor dimension fastest, then pipeline, then data:

    rank = data_rank * (pipeline * tensor) + pipeline_rank * tensor + tensor_rank

so a model-parallel block (one replica of the model) is `pipeline * tensor` contiguous ranks. This is
Megatron's order "tp-pp-dp", not its default "tp-cp-ep-dp-pp": contiguous blocks are what lets the teacher's
blocks nest in the student's (or the reverse), and then hidden states never leave a block.
"""

from dataclasses import dataclass

from sead_megatron.errors import UserError, alternatives


@dataclass(frozen=True)
class Layout:
    """`tensor` * `pipeline` ranks hold one replica; `world` ranks hold `data` replicas.

    Raises ValueError when the block does not divide the world (`check_config` says so in the user's words
    first).
    """

    tensor: int
    pipeline: int
    world: int

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.world) < 1 or self.world % self.block_size:
            raise ValueError(f"no layout: tensor {self.tensor}, pipeline {self.pipeline}, world {self.world}")

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}"

    @property
    def block_size(self) -> int:
        """Ranks of one model-parallel block."""
        return self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel size: the number of replicas."""
        return self.world // self.block_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tensor

    def pp_rank(self, rank: int) -> int:
        return rank // self.tensor % self.pipeline

    def dp_rank(self, rank: int) -> int:
        """Also the index of the model-parallel block that the rank belongs to."""
        return rank // self.block_size

    def rank_of(self, *, dp: int, pp: int, tp: int) -> int:
        """The inverse of (`dp_rank`, `pp_rank`, `tp_rank`)."""
        return dp * self.block_size + pp * self.tensor + tp

    def tensor_groups(self) -> list[list[int]]:
        """One group for each (dp, pp): contiguous ranks in tensor order."""
        return [list(range(first, first + self.tensor)) for first in range(0, self.world, self.tensor)]

    def pipeline_groups(self) -> list[list[int]]:
        """One group for each (dp, tp): from the first stage to the last."""
        return [
            [self.rank_of(dp=dp, pp=pp, tp=tp) for pp in range(self.pipeline)]
            for dp in range(self.data)
            for tp in range(self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """One group for each (pp, tp): the ranks that hold the same shard."""
        return [list(range(first, self.world, self.block_size)) for first in range(self.block_size)]

    def block_groups(self) -> list[list[int]]:
        """One group for each replica: its `pipeline * tensor` contiguous ranks."""
        return [
            list(range(first, first + self.block_size)) for first in range(0, self.world, self.block_size)
        ]


def check_nested(student: Layout, teacher: Layout, name: str = "teacher") -> None:
    """Refuse layouts whose model-parallel blocks do not nest.

    One side's block must be a multiple of the other's: the teacher replica that covers a block scores the
    sequences of the student replicas on the same ranks, which is only possible when no block straddles
    another's border. `name`: the section that describes the frozen model.
    """
    if student.world != teacher.world:
        raise ValueError(f"layouts of different worlds: {student.world} and {teacher.world} ranks")
    small, large = sorted((student.block_size, teacher.block_size))
    if large % small == 0:
        return
    world, block = student.world, student.block_size
    nesting = [
        size for size in range(1, world + 1) if world % size == 0 and (size % block == 0 or block % size == 0)
    ]
    raise UserError(
        f"{name}.parallel",
        f"TP{teacher.tensor} PP{teacher.pipeline}",
        f"its block of {teacher.block_size} ranks must be a multiple or a divisor of the student's block of "
        f"{block} (TP{student.tensor} PP{student.pipeline})",
        f"choose a {name} tensor * pipeline of {alternatives(nesting)}",
    )
