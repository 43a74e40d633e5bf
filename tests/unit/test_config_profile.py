"""The profile section: which steps and ranks can be profiled, each mistake in one exact line."""

from pathlib import Path

import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.errors import UserError
from tests.tiny_inputs import write_inputs


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 4 steps."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def mistake(path: Path, world_size: int, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_config(load_config(path, overrides), world_size)
    return str(error.value)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (1, ["profile.stop_step=3"],
         "profile.start_step = 0: must be at least 1 with profile.stop_step 3: steps count from 1; set it, or set both "
         "to 0 to profile nothing"),
        (1, ["profile.start_step=2"],
         "profile.stop_step = 0: must be greater than profile.start_step (2): it is the first step that is not "
         "profiled; use 3 to profile one step"),
        (1, ["profile.start_step=2", "profile.stop_step=2"],
         "profile.stop_step = 2: must be greater than profile.start_step (2): it is the first step that is not "
         "profiled; use 3 to profile one step"),
        (1, ["profile.start_step=5", "profile.stop_step=6"],
         "profile.start_step = 5: must be at most steps (4); use for example 4"),
        (1, ["profile.start_step=3", "profile.stop_step=6"],
         "profile.stop_step = 6: must be at most 5, the step after the last (steps is 4); use 5, or raise steps"),
        (2, ["profile={start_step: 1, stop_step: 2, ranks: [0, 2, 1, 7]}"],
         "profile.ranks = [0, 2, 1, 7]: must be less than the world size (2); leave out 2 and 7"),
        (1, ["profile.start_step=-1"], "profile.start_step = -1: must be at least 0; use for example 0"),
        (1, ["profile.ranks=[]"], "profile.ranks = []: must not be empty; use for example [0]"),
        (1, ["profile.ranks=0"], "profile.ranks = 0: must be a list; use for example [0]"),
        (1, ["profile.step=1"], "profile.step: unknown key; did you mean profile.stop_step?"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_exact_line(good: Path, world: int, overrides: list[str], message: str) -> None:
    assert mistake(good, world, *overrides) == message


def test_off_by_default(good: Path) -> None:
    config = load_config(good)
    assert not config.profile.enabled
    assert config.profile.ranks == [0]
    check_config(load_config(good, ["profile.ranks=[9]"]), 1)  # nothing is profiled: no rank is looked at


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (1, 5), (4, 5)])
def test_steps_that_can_be_profiled(good: Path, start: int, stop: int) -> None:
    """All four steps, the first and the last."""
    config = load_config(good, [f"profile={{start_step: {start}, stop_step: {stop}, ranks: [0, 1]}}"])
    assert config.profile.enabled
    check_config(config, 2)
