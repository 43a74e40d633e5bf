"""What holds for every objective, and what single ones promise beyond their gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sead_megatron.data.terms import Term
from sead_megatron.data.types import TokenTable
from sead_megatron.metrics import METRICS
from sead_megatron.objectives import OBJECTIVES
from sead_megatron.objectives.advantages import RunningMoments, group_advantages
from sead_megatron.objectives.opsd import Opsd
from sead_megatron.objectives.reopold import Reopold
from sead_megatron.objectives.scope import softmax_weights
from sead_megatron.objectives.selection import kept_count, lookahead_min, rescaled, top_share
from sead_megatron.objectives.teachable import Teachable, downward_change
from tests.objective_world import loss_gradient, make_objective, make_world

NAMES = sorted(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_detached_and_every_metric_is_documented(name: str) -> None:
    coefficients = make_objective(name).coefficients(make_world().table(), 0)
    assert not coefficients.weights.requires_grad and coefficients.normalizer > 0
    assert set(coefficients.metrics) <= set(METRICS)
    assert all(math.isfinite(value) for value in coefficients.metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_response_token_gives_a_zero_loss(name: str) -> None:
    world = make_world(lengths=[0, 0, 0])
    coefficients = make_objective(name).coefficients(world.table(), 0)
    assert coefficients.weights.shape == (0, 4) and coefficients.normalizer > 0
    assert all(math.isfinite(value) for value in coefficients.metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_no_column_that_it_does_not_ask_for(name: str) -> None:
    """The trainer measures what is asked for and nothing else."""
    objective, world = make_objective(name), make_world()
    table = world.table()
    given = {"student_entropy", "rollout_logprob", "sampling_logprob"}
    if objective.needs_token_stats(0):
        given |= {"forward_kl", "reverse_kl", "student_logprob", "teacher_logprob", "teacher_entropy"}
    if objective.topk_lists:
        given |= {"gap_head", "gap_tail", "topk_margin"}
    if objective.teacher_argmax:
        given |= {"argmax_student_logprob", "argmax_teacher_logprob"}
    if objective.needs_teacher_entropy:
        given.add("teacher_entropy")
    if objective.needs_teacher_logprob:
        given.add("teacher_logprob")
    if objective.config.needs_reference:
        given.add("reference_logprob")
    dropped: dict[str, Any] = {column: None for column in TokenTable.column_names() if column not in given}
    least = replace(table, **dropped)
    weights = objective.coefficients(least, 0).weights
    assert torch.equal(weights, make_objective(name).coefficients(table, 0).weights)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_restart(name: str) -> None:
    first, second = make_world(seed=3).table(), make_world(seed=4).table()
    objective = make_objective(name)
    objective.coefficients(first, 0)
    resumed = make_objective(name)
    resumed.load_state_dict(objective.state_dict())
    expected = objective.coefficients(second, 1)
    assert torch.equal(resumed.coefficients(second, 1).weights, expected.weights)
    with pytest.raises(ValueError, match=r"state|moments"):
        resumed.load_state_dict({"other": 1})


def test_gopd_of_strength_one_is_sampled_opd_bit_for_bit() -> None:
    table = replace(make_world().table(), reference_logprob=None)
    one = make_objective("gopd", strength=1).coefficients(table, 0)
    opd = make_objective("opd", form="sampled").coefficients(table, 0)
    assert torch.equal(one.weights, opd.weights) and one.normalizer == opd.normalizer


def test_the_sampled_gradients_are_unbiased() -> None:
    """Over all seven possible tokens of each position, weighted by q: sampled OPD and vOPD give the full gradient."""
    world = make_world()
    q = world.student.softmax(-1)
    expected = loss_gradient(world, make_objective("opd").coefficients(world.table(), 0))
    for name, settings in (("opd", {"form": "sampled"}), ("vopd", {})):
        mean = torch.zeros_like(world.student)
        for token in range(world.student.shape[1]):
            drawn = replace(world, labels=torch.full_like(world.labels, token))
            coefficients = make_objective(name, **settings).coefficients(drawn.table(), 0)
            mean += q[:, token, None] * loss_gradient(drawn, coefficients)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-8)


def test_position_weights_of_pw_opsd() -> None:
    """0.2856 at the beginning of a response, 0.9993 at its end."""
    objective = make_objective("opsd", divergence="forward", positions={})
    assert isinstance(objective, Opsd) and objective.config.positions is not None
    table = TokenTable(offsets=torch.tensor([0, 100_000]))
    weights = objective.position_weights(table, objective.config.positions)
    assert (float(weights[0]), float(weights[-1])) == pytest.approx((0.2856, 0.9993), abs=1e-4)


def test_eopd_without_a_gate_is_sampled_opd() -> None:
    world = make_world()
    eopd = make_objective("eopd", threshold=1e9, topk=3).coefficients(world.table(), 0)
    opd = make_objective("opd", form="sampled").coefficients(world.table(), 0)
    assert torch.equal(eopd.weights, opd.weights) and eopd.normalizer == opd.normalizer
    torch.testing.assert_close(loss_gradient(world, eopd), loss_gradient(world, opd), rtol=1e-12, atol=1e-15)


def test_a_change_point_needs_a_fall_that_pays_for_itself() -> None:
    assert downward_change([2.0, 2.1, 1.9, 2.0, 0.5, 0.4, 0.6]) == 4
    assert downward_change([0.5, 0.4, 0.6, 2.0, 2.1, 1.9]) is None  # upward
    assert downward_change([1.0, 1.1, 0.9, 1.05, 0.95]) is None  # noise: 5 log(SSE_0 / SSE_c) <= 2 log 5
    assert downward_change([1.0, 1.0]) is None and downward_change([1.0]) is None
    assert downward_change([2.0, 2.0, 1.0]) == 2  # without any noise


def test_a_rollout_is_released_up_to_its_change_point() -> None:
    objective = make_objective("teachable", segment_tokens=2)
    assert isinstance(objective, Teachable)
    margin = torch.tensor([2.0, 2.0, 2.1, 1.9, 2.0, 2.2, 0.1, 0.3, 0.2, 0.0, 0.1], dtype=torch.float64)
    assert objective.released_tokens(margin) == 6
    assert objective.released_tokens(margin[:3]) == 3
    table = TokenTable(offsets=torch.tensor([0, 11, 14]), topk_margin=torch.cat([margin, margin[:3]]).float())
    coefficients = objective.coefficients(table, 0)
    assert coefficients.weights[:, Term.REVERSE_KL].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 11, 12, 13]
    assert coefficients.normalizer == 9.0


def test_reopolds_floor() -> None:
    objective = make_objective("reopold")
    assert isinstance(objective, Reopold)
    assert objective.floor == pytest.approx(-2.558428, abs=1e-6)


def test_look_ahead_stays_in_the_response() -> None:
    table = TokenTable(offsets=torch.tensor([0, 3, 3, 5]))
    signal = torch.tensor([3.0, 2.0, 5.0, 4.0, 1.0])
    assert lookahead_min(table, signal, 0).tolist() == signal.tolist()
    assert lookahead_min(table, signal, 1).tolist() == [2.0, 2.0, 5.0, 1.0, 1.0]
    assert lookahead_min(table, signal, 9).tolist() == [2.0, 2.0, 5.0, 1.0, 1.0]
    assert lookahead_min(table, torch.ones(5), 2).tolist() == [1.0] * 5


def test_looking_ahead_only_raises_gates() -> None:
    world = make_world()
    table = world.table()
    plain = make_objective("egrsd", gamma=0.3).coefficients(table, 0).weights[:, Term.LOGPROB].abs()
    ahead = (
        make_objective("egrsd", gamma=0.3, look_ahead=2).coefficients(table, 0).weights[:, Term.LOGPROB].abs()
    )
    assert bool((ahead >= plain).all()) and bool((ahead > plain).any())


def test_selection_by_rank_is_exact_under_ties() -> None:
    assert top_share(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 0.4).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert [kept_count(share, 100) for share in (0.29, 0.291, 1.0, 0.001)] == [29, 30, 100, 1]
    assert kept_count(0.5, 0) == 0


def test_rescaled() -> None:
    assert rescaled(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert rescaled(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    signal = torch.cat([torch.arange(101.0), torch.tensor([1e6])])
    # Positions 5 and 96 of 0 .. 101 in order.
    assert rescaled(signal, 0.05, 0.95)[[0, 5, 96, 101]].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_group_advantages_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    half = 0.5 / math.sqrt(0.5)
    expected = [half, -half, 0.0, 0.0, half, -half]
    assert group_advantages(reward, group).tolist() == pytest.approx(expected, abs=1e-5)
    assert group_advantages(reward[:1], group[:1]).tolist() == [0.0]


def test_equal_groups_leave_the_denominator() -> None:
    world = make_world(rewards=[1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    coefficients = make_objective("grpo").coefficients(world.table(), 0)
    assert coefficients.normalizer == 11.0  # tokens of the second prompt
    assert not coefficients.weights[:8].any()
    assert coefficients.metrics["reward/equal_groups"] == 0.5
    kept = make_objective("grpo", drop_equal_groups=False).coefficients(world.table(), 0)
    assert kept.normalizer == 19.0 and torch.equal(kept.weights, coefficients.weights)


def test_running_moments_are_those_of_everything_seen() -> None:
    moments, seen = RunningMoments(), []
    for batch in ([1.0, 0.0], [0.0, 0.5, 1.5]):
        seen += batch
        everything = torch.tensor(seen, dtype=torch.float64)
        expected = (torch.tensor(batch, dtype=torch.float64) - everything.mean()) / everything.std()
        torch.testing.assert_close(moments.whiten(torch.tensor(batch)), expected, rtol=1e-5, atol=1e-6)


def test_scope_weights_have_mean_one() -> None:
    weights = softmax_weights(torch.tensor([0.0, math.log(3.0), 5.0]), torch.tensor([0, 0, 1]))
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.0])


def test_drkl_stays_finite_where_the_student_is_certain() -> None:
    world = make_world()
    certain = world.student.clone()
    certain[torch.arange(world.num_tokens), world.teacher_argmax] += 40.0
    coefficients = make_objective("drkl").coefficients(replace(world, student=certain).table(), 0)
    assert bool(coefficients.weights.isfinite().all())
    assert float(coefficients.weights[:, Term.REVERSE_KL].max()) <= 0.5 / 1e-3 + 1


def test_lengths_grow_while_the_entropy_is_healthy() -> None:
    objective = make_objective("decoupled", lengths=[8, 16], steps_per_stage=2, healthy_entropy=0.95)
    table = make_world().table()
    assert [objective.longest_response(0), objective.longest_response(1)] == [8, 8]
    objective.coefficients(table, 0)
    assert objective.longest_response(1) == 8
    objective.coefficients(table, 1)
    assert objective.longest_response(2) == 16
    assert table.student_entropy is not None
    collapsed = replace(table, student_entropy=table.student_entropy * 0)
    for step in range(2, 6):
        objective.coefficients(collapsed, step)
    assert objective.longest_response(6) == 16  # 0.9 < 0.95: held
    for step in range(6, 40):
        objective.coefficients(table, step)
    assert objective.longest_response(40) is None
