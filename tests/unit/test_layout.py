"""Rank arithmetic, against lists written by hand."""

import pytest

from sead_megatron.errors import UserError
from sead_megatron.parallel.layout import Layout, check_nested


def test_tp2_pp2_dp2_by_hand() -> None:
    layout = Layout(tensor=2, pipeline=2, world=8)
    assert (layout.data, layout.block_size, str(layout)) == (2, 4, "TP2 PP2 DP2")
    assert [layout.tp_rank(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [layout.pp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [layout.dp_rank(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.pipeline_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.data_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.block_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tp1_pp3_dp2_by_hand() -> None:
    layout = Layout(tensor=1, pipeline=3, world=6)
    assert layout.tensor_groups() == [[0], [1], [2], [3], [4], [5]]
    assert layout.pipeline_groups() == [[0, 1, 2], [3, 4, 5]]
    assert layout.data_groups() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world"), [(1, 1, 1), (4, 1, 8), (1, 4, 8), (2, 3, 12), (2, 2, 16)]
)
def test_every_kind_of_group_partitions_the_world(tensor: int, pipeline: int, world: int) -> None:
    layout = Layout(tensor, pipeline, world)
    sizes = {
        tensor: layout.tensor_groups(),
        pipeline: layout.pipeline_groups(),
        layout.data: layout.data_groups(),
        tensor * pipeline: layout.block_groups(),
    }
    for size, groups in sizes.items():
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert {len(group) for group in groups} == {size}
    for rank in range(world):
        place = {"dp": layout.dp_rank(rank), "pp": layout.pp_rank(rank), "tp": layout.tp_rank(rank)}
        assert layout.rank_of(**place) == rank


def test_megatron_numbers_ranks_the_same_way() -> None:
    """Megatron-core's own generator with its order "tp-pp-dp" gives the same groups."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    layout = Layout(tensor=2, pipeline=3, world=12)
    generator = parallel_state.RankGenerator(tp=2, ep=1, dp=2, pp=3, cp=1, order="tp-pp-dp")
    assert layout.tensor_groups() == generator.get_ranks("tp")
    assert layout.pipeline_groups() == generator.get_ranks("pp")
    assert layout.data_groups() == generator.get_ranks("dp")
    assert layout.block_groups() == generator.get_ranks("tp-pp")


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(3, 1, 4), (2, 2, 6), (0, 1, 4), (4, 2, 4)])
def test_no_layout(tensor: int, pipeline: int, world: int) -> None:
    with pytest.raises(ValueError, match="no layout"):
        Layout(tensor, pipeline, world)


@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 1), (4, 2)), ((2, 2), (4, 1)), ((4, 2), (2, 1)), ((1, 1), (1, 1))]
)
def test_blocks_that_nest(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    check_nested(Layout(*student, world=8), Layout(*teacher, world=8))


def test_blocks_that_straddle() -> None:
    with pytest.raises(UserError) as error:
        check_nested(Layout(2, 1, world=12), Layout(1, 3, world=12))
    assert str(error.value) == (
        'teacher.parallel = "TP1 PP3": its block of 3 ranks must be a multiple or a divisor of the '
        "student's block "
        "of 2 (TP2 PP1); choose a teacher tensor * pipeline of 1, 2, 4, 6 or 12"
    )


def test_layouts_of_different_worlds() -> None:
    with pytest.raises(ValueError, match="8 and 4 ranks"):
        check_nested(Layout(1, 1, world=8), Layout(1, 1, world=4))
