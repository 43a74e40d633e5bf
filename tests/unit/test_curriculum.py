import json
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sead_megatron.config.schema import CurriculumConfig
from sead_megatron.data.curriculum import Curriculum, build_curriculum
from sead_megatron.errors import UserError

EIGHTHS = [i % 9 / 8 for i in range(45)]  # what 8 rollouts a prompt can measure
Name = Literal["sorted_noise", "competence", "uniform"]
NAMES: list[Name] = ["sorted_noise", "competence", "uniform"]


def make(
    name: Name,
    difficulties: list[float] | None = EIGHTHS,
    steps: int = 20,
    batch: int = 6,
    seed: int = 3,
    **changes: Any,
) -> Curriculum:
    # The difficulty file's path is the caller's business; here the values are given.
    config = CurriculumConfig(
        name=name, difficulty=None if difficulties is None else "difficulty.jsonl", **changes
    )
    return build_curriculum(
        config, difficulties, 45 if difficulties is None else len(difficulties), steps, batch, seed
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=6, max_size=80),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.02, 0.1]),
)
def test_sorted_noise_presents_every_prompt_once_easy_to_hard(
    eighths: list[int], seed: int, sigma: float
) -> None:
    difficulties = [value / 8 for value in eighths]
    curriculum = make("sorted_noise", difficulties, batch=1, seed=seed, sigma=sigma)
    order = [curriculum.next_batch(step)[0] for step in range(len(difficulties))]
    assert sorted(order) == list(range(len(difficulties)))
    presented = np.array(difficulties)[order]
    # A prompt can precede an easier one only by the difference of two draws of the noise.
    drop = np.maximum.accumulate(presented) - presented
    assert drop.max() <= 10 * sigma


def test_sorted_noise_is_the_sort_of_the_noisy_difficulties() -> None:
    curriculum = make("sorted_noise", sigma=0.3)
    noise = np.random.default_rng([3, 0]).normal(0.0, 0.3, 45)
    order = sorted(range(45), key=lambda i: EIGHTHS[i] + noise[i])
    assert [curriculum.next_batch(step) for step in range(7)] == [order[i : i + 6] for i in range(0, 42, 6)]


def test_small_noise_only_shuffles_inside_the_levels() -> None:
    orders = []
    for seed in (1, 2):
        curriculum = make("sorted_noise", batch=45, seed=seed)
        orders.append(curriculum.next_batch(0))
        assert [EIGHTHS[i] for i in orders[-1]] == sorted(EIGHTHS)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("name", ["sorted_noise", "uniform"])
def test_a_further_pass_has_all_prompts_in_another_order(name: Name) -> None:
    curriculum = make(name, steps=15)
    stream = [index for step in range(15) for index in curriculum.next_batch(step)]
    assert sorted(stream[:45]) == sorted(stream[45:]) == list(range(45))
    assert stream[:45] != stream[45:]


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_a_function_of_seed_and_step(name: Name) -> None:
    forward = make(name)
    batches = [forward.next_batch(step) for step in range(20)]
    backward = make(name)
    assert [backward.next_batch(step) for step in reversed(range(20))] == batches[::-1]
    assert forward.next_batch(19) == batches[19]  # asked again
    assert [make(name, seed=4).next_batch(step) for step in range(20)] != batches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stopped_after", [0, 6, 7, 14, 15])
def test_resuming_gives_the_same_batches(name: Name, stopped_after: int) -> None:
    curriculum = make(name)
    for step in range(stopped_after + 1):
        curriculum.next_batch(step)
    state = json.loads(json.dumps(curriculum.state_dict()))
    expected = [curriculum.next_batch(step) for step in range(stopped_after + 1, 20)]
    resumed = make(name)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(step) for step in range(stopped_after + 1, 20)] == expected
    # The checkpoint of an earlier step serves as well: the batch after it is drawn anew, the same.
    resumed.load_state_dict(state)
    assert resumed.next_batch(stopped_after + 1) == resumed.next_batch(stopped_after + 1) == expected[0]


def test_the_saved_order_outlives_a_new_estimate_of_the_difficulties() -> None:
    before, after = make("sorted_noise"), make("sorted_noise", EIGHTHS[::-1])
    seen = [index for step in range(3) for index in before.next_batch(step)]
    after.load_state_dict(before.state_dict())
    rest = [index for step in range(3, 7) for index in after.next_batch(step)]
    assert sorted(seen + rest) == sorted(set(seen + rest))
    assert rest == [index for step in range(3, 7) for index in before.next_batch(step)]
    across_passes = after.next_batch(7)
    assert across_passes[:3] == before.next_batch(7)[:3]
    assert after.next_batch(7) == across_passes


def test_a_run_resumed_with_another_batch_size_goes_on_where_it_stopped() -> None:
    before, after = make("sorted_noise", batch=6), make("sorted_noise", batch=9)
    seen = [index for step in range(3) for index in before.next_batch(step)]
    after.load_state_dict(before.state_dict())
    rest = [index for step in range(3, 6) for index in after.next_batch(step)]
    assert sorted(seen + rest) == list(range(45))
    with pytest.raises(ValueError, match="step 0 lies before"):
        after.next_batch(0)


def competence_at(curriculum: Any, step: int) -> float:
    return float(curriculum.competence(step))


def test_competence_by_hand() -> None:
    linear, square = make("competence", steps=20), make("competence", steps=20, c0=0.25, power=2.0)
    assert [competence_at(linear, step) for step in (0, 5, 10, 20, 30)] == [0.5, 0.625, 0.75, 1.0, 1.0]
    assert [competence_at(square, step) for step in (0, 10, 20)] == [0.25, 0.5625, 1.0]


@settings(deadline=None)
@given(st.integers(0, 19), st.integers(0, 2**31))
def test_competence_draws_distinct_prompts_below_the_frontier(step: int, seed: int) -> None:
    curriculum = make("competence", seed=seed)
    batch = curriculum.next_batch(step)
    frontier = 0.5 * (1 + step / 20)
    assert len(set(batch)) == len(batch) == 6
    assert max(EIGHTHS[i] for i in batch) <= frontier
    assert curriculum.metrics["curriculum/eligible"] == sum(value <= frontier for value in EIGHTHS)
    assert curriculum.metrics["curriculum/filled"] == 0.0


def test_competence_draws_uniformly() -> None:
    curriculum = make("competence", steps=10**9)  # 25 eligible prompts in every step
    counts = np.zeros(45)
    for step in range(4000):
        counts[curriculum.next_batch(step)] += 1
    assert set(np.flatnonzero(counts)) == {i for i, value in enumerate(EIGHTHS) if value <= 0.5}
    expected = 4000 * 6 / 25
    assert np.abs(counts[counts > 0] - expected).max() < 5 * np.sqrt(expected)


def test_competence_includes_difficulties_equal_on_paper() -> None:
    curriculum = make("competence", [0.2, 1 - 0.7, 0.9], steps=5, batch=2, c0=0.3)
    assert 1 - 0.7 > 0.3  # in floating point
    assert sorted(curriculum.next_batch(0)) == [0, 1]
    assert curriculum.metrics["curriculum/filled"] == 0.0


def test_competence_fills_a_batch_with_the_easiest_and_counts_it() -> None:
    curriculum = make("competence", [0.9, 0.1, 0.7, 0.8, 0.6], batch=4)
    assert curriculum.next_batch(0) == [1, 4, 2, 3]
    assert curriculum.metrics == pytest.approx(
        {"curriculum/eligible": 1.0, "curriculum/filled": 3.0, "curriculum/difficulty_mean": 0.55}
    )
    nothing_eligible = make("competence", [0.9, 1.0, 0.8], batch=2)
    assert nothing_eligible.next_batch(0) == [2, 0]


def test_metrics_of_the_passes() -> None:
    curriculum = make("sorted_noise", [0.5, 0.0, 1.0, 0.25], batch=3, sigma=0.0)
    assert curriculum.next_batch(0) == [1, 3, 0]
    assert curriculum.metrics == {"curriculum/eligible": 3.0, "curriculum/difficulty_mean": 0.25}
    assert curriculum.next_batch(1) == [2, 1, 3]
    assert curriculum.metrics["curriculum/eligible"] == 2.0
    uniform = make("uniform", None)
    uniform.next_batch(0)
    assert uniform.metrics == {"curriculum/eligible": 45.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "uniform", "batch": 46}, "data.prompts_per_step = 46: .* from 45 prompts; use at most 45"),
        ({"name": "uniform", "difficulties": [0.5, 1.5], "batch": 2}, "difficulty of prompt 1 = 1.5"),
        (
            {"name": "competence", "difficulties": [float("nan"), 0.5], "batch": 2},
            "difficulty of prompt 0 = NaN",
        ),
    ],
)
def test_user_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**arguments)


@pytest.mark.parametrize("name", ["sorted_noise", "competence"])
def test_difficulties_are_required(name: Name) -> None:
    config = CurriculumConfig(name=name, difficulty="difficulty.jsonl")
    with pytest.raises(UserError, match=r"curriculum.difficulty: .*curriculum.name: uniform"):
        build_curriculum(config, None, 45, 20, 6, 3)
    with pytest.raises(ValueError, match=r"\(44,\) difficulties for 45 prompts"):
        build_curriculum(config, EIGHTHS[1:], 45, 20, 6, 3)


def test_the_state_of_another_curriculum_is_refused() -> None:
    with pytest.raises(UserError, match="written with uniform over 45 prompts"):
        make("sorted_noise").load_state_dict(make("uniform").state_dict())
    with pytest.raises(UserError, match="written with competence over 45 prompts"):
        make("competence", EIGHTHS[1:]).load_state_dict(make("competence").state_dict())
