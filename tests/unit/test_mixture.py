"""GKD's mixture: which batches are fixed responses, what their tokens are, and what an objective needs for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.data.mixture import fixed_rollouts, is_own_batch
from sead_megatron.data.tokenised import training_prompts
from sead_megatron.data.types import FIXED_RESPONSE, TokenTable
from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import load_tokenizer
from sead_megatron.objectives import OBJECTIVES
from sead_megatron.objectives.base import MixtureSection
from tests.objective_world import make_objective, make_world
from tests.tiny_inputs import WORDS, write_inputs, write_jsonl

MIXED = sorted(name for name, (section, _) in OBJECTIVES.items() if issubclass(section, MixtureSection))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = write_inputs(tmp_path)
    solutions = ["three", "one plus two is three", "two is two is two is two"]
    prompts = [{"id": f"p{i}", "prompt": "one plus two", "solution": solutions[i % 3]} for i in range(8)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    return path


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_the_share_of_batches(share: float) -> None:
    """lambda is the student's share; 4,000 coins are within 4 standard deviations of it."""
    own = [is_own_batch(1234, step, share) for step in range(4000)]
    assert abs(np.mean(own) - share) <= 4 * (share * (1 - share) / 4000) ** 0.5


def test_the_coin_depends_on_seed_and_step_only() -> None:
    first = [is_own_batch(7, step, 0.5) for step in range(64)]
    assert [is_own_batch(7, step, 0.5) for step in reversed(range(64))] == first[::-1]
    assert [is_own_batch(8, step, 0.5) for step in range(64)] != first
    # A larger share keeps the batches of a smaller one.
    assert all(is_own_batch(7, step, 0.8) for step in range(64) if first[step])


def test_a_fixed_batch(path: Path) -> None:
    """The solutions' tokens and the end of a response, cut where a rollout would be."""
    config = load_config(path, ["objective={name: gkd, student_share: 0.5}", "rollout.max_new_tokens=6"])
    tokenizer = load_tokenizer(config.student.path)
    prompts = training_prompts(config, tokenizer)
    rollouts = fixed_rollouts([5, 0, 4], prompts, 2)
    assert [rollout.prompt_index for rollout in rollouts] == [5, 5, 0, 0, 4, 4]
    ids = {word: i for i, word in enumerate(WORDS)}
    expected = {
        5: ["two", "is", "two", "is", "two", "is"],
        0: ["three", "</s>"],
        4: ["one", "plus", "two", "is", "three", "</s>"],
    }
    for rollout in rollouts:
        wanted = expected[rollout.prompt_index]
        assert rollout.response_ids.tolist() == [ids[word] for word in wanted]
        assert rollout.finished == (wanted[-1] == "</s>")
        assert rollout.prompt_ids.tolist() == list(prompts[rollout.prompt_index].token_ids)
        assert rollout.weight_version == FIXED_RESPONSE
    table = TokenTable.from_rollouts(rollouts, "cpu")
    assert table.num_tokens == 28 and table.rollout_logprob is None and table.student_entropy is None


def test_prompts_without_a_solution(path: Path) -> None:
    lines = [json.loads(line) for line in (path.parent / "prompts.jsonl").read_text().splitlines()]
    for line in lines[2:5]:
        del line["solution"]
    write_jsonl(path.parent / "prompts.jsonl", lines)
    check_config(load_config(path, ["objective={name: gkd}"]), 1)
    with pytest.raises(UserError) as error:
        check_config(load_config(path, ["objective={name: gkd, student_share: 0.9}"]), 1)
    assert str(error.value) == (
        "data.prompts: solution: missing in 3 of 8 prompts, the first 'p2'; objective gkd trains on it, or "
        "on turns, where student_share is below 1; add it or remove these prompts"
    )


def test_a_length_curriculum_needs_rollouts(path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_config(load_config(path, ["objective={name: decoupled, lengths: [8], student_share: 0.5}"]), 1)
    assert str(error.value) == (
        "objective.student_share = 0.5: must be 1 with objective.lengths, which follow the entropy of rollouts; use 1, "
        "or no lengths"
    )


def test_nothing_is_sampled_without_a_share_of_the_students(path: Path) -> None:
    checked = check_config(load_config(path, ["objective={name: gkd, student_share: 0}"]), 1)
    assert "no engine" in checked.summary("uniform")


@pytest.mark.parametrize("name", MIXED)
def test_coefficients_need_nothing_of_the_engine(name: str) -> None:
    """The same with and without what only a sampler knows."""
    assert MIXED == ["akl", "decoupled", "drkl", "gkd"]
    settings = {"target": "sampled"} if name == "drkl" else {}
    whole = make_world().table()
    columns: dict[str, Any] = {
        column: None if column in ("rollout_logprob", "sampling_logprob") else getattr(whole, column)
        for column in TokenTable.column_names()
    }
    if not make_objective(name).needs_token_stats(0):
        columns["student_entropy"] = None
    fixed = TokenTable(offsets=whole.offsets, rollouts=whole.rollouts, **columns)
    ours, theirs = (make_objective(name, **settings).coefficients(table, 0) for table in (fixed, whole))
    assert ours.weights.equal(theirs.weights) and ours.normalizer == theirs.normalizer


def test_the_target_of_drkl_is_the_next_token_of_a_fixed_response() -> None:
    """And the teacher's likeliest token in a rollout."""
    rollouts = make_world().table()
    fixed = replace(rollouts, rollout_logprob=None)
    given, sampled = (make_objective("drkl", target=target) for target in ("teacher", "sampled"))
    expected = sampled.coefficients(fixed, 0)
    assert given.coefficients(fixed, 0).weights.equal(expected.weights)
    assert not given.coefficients(fixed, 0).teacher_argmax
    assert (
        given.coefficients(rollouts, 0).teacher_argmax
        and not sampled.coefficients(rollouts, 0).teacher_argmax
    )
    assert not given.coefficients(rollouts, 0).weights.equal(expected.weights)
    assert not make_objective("drkl", student_share=0).teacher_argmax
