import math

import pytest

from sead_megatron.objectives.schedule import cosine_annealing


def test_hand_values_of_equation_7() -> None:
    values = [cosine_annealing(step, 4, 0.8, 0.0) for step in range(5)]
    root = math.sqrt(0.5)
    assert values == pytest.approx([0.8, 0.4 * (1 + root), 0.4, 0.4 * (1 - root), 0.0], abs=1e-15)
    assert cosine_annealing(0, 7, 0.8, 0.0) == 0.8
    assert cosine_annealing(7, 7, 0.8, 0.2) == 0.2


def test_another_end_and_a_rising_schedule() -> None:
    assert cosine_annealing(3, 6, 0.9, 0.1) == pytest.approx(0.5)
    assert cosine_annealing(2, 6, 0.0, 1.0) == pytest.approx(0.25)


def test_last_update_of_the_papers_run_is_not_quite_the_end() -> None:
    assert cosine_annealing(180, 181, 0.8, 0.0) == pytest.approx(6.025e-5, rel=1e-3)


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (5, 4), (0, 0)])
def test_refuses_steps_outside_the_run(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        cosine_annealing(step, total, 0.8, 0.0)
