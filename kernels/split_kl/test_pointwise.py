"""Pointwise divergences and their gradients against autograd of the published definitions in float64.

Tolerances as in test_stats.py and test_loss.py. A rounded log-sum-exp is off by half an ulp of a number near 10, 5e-7,
which every logarithm carries: float32 divergences are off by up to 5e-6 and gradients by up to 6e-6 here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    BACKENDS,
    PointwiseRule,
    TileOptions,
    TokenStats,
    VocabShard,
    finalize,
    linear_pointwise_grads,
    linear_pointwise_stats,
    linear_stats,
)
from sead_kernels.split_kl.reference import dense_pointwise
from sead_kernels.split_kl.testing import (
    POINTWISE_RULES,
    SMALL_TILES,
    Problem,
    make_problem,
    merged_state,
    relative_error,
    run_pointwise,
    small_tiles,
)
from torch import Tensor
from torch.nn import Parameter

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}


def name_of(rule: PointwiseRule) -> str:
    return "-".join(str(part) for part in (rule.kind, rule.share, rule.clip) if part is not None)


every_rule = pytest.mark.parametrize("rule", POINTWISE_RULES, ids=name_of)


def pair(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return problem.inputs()[:4]


def oracle(problem: Problem, rule: PointwiseRule, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], dh, dW) of the loss with the first column of the coefficients, float64."""
    hidden = problem.student_hidden.detach().double().requires_grad_()
    weight = problem.student_weight.detach().double().requires_grad_()
    teacher = problem.teacher_hidden, problem.teacher_weight
    divergence = dense_pointwise(hidden, weight, *teacher, rule, valid=problem.valid, temperature=temperature)
    loss = (problem.coefficients[:, 0].double() * divergence).sum()
    return divergence.detach(), *torch.autograd.grad(loss, (hidden, weight))


def summed(
    problem: Problem,
    stats: TokenStats,
    rule: PointwiseRule,
    ranks: int,
    *,
    temperature: float = 1.0,
    options: TileOptions = SMALL_TILES,
) -> Tensor:
    """``linear_pointwise_stats`` over all shards."""
    parts = []
    for local, shard in (problem.local(rank, ranks) for rank in range(ranks)):
        parts.append(
            linear_pointwise_stats(
                *pair(local), stats, rule, shard=shard, temperature=temperature, options=options
            )
        )
    return torch.stack(parts).sum(0)


def test_hand_values(tiles: TileOptions) -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2); of the forward divergence one entry is clamped, and has no gradient."""
    one = torch.ones(1, 1)
    student, teacher = torch.tensor([[math.log(3.0)], [0.0]]), torch.zeros(2, 1)
    shard = VocabShard(0, 2)
    stats = finalize(linear_stats(one, student, one, teacher, torch.tensor([0]), shard=shard, options=tiles))
    mixture = (0.3 * 0.5 + 0.7 * 0.75, 0.3 * 0.5 + 0.7 * 0.25)
    expected = {
        PointwiseRule("jsd", 0.3): sum(
            0.3 * 0.5 * math.log(0.5 / m) + 0.7 * p * math.log(p / m)
            for p, m in zip((0.75, 0.25), mixture, strict=True)
        ),
        PointwiseRule("skew_forward", 0.3): sum(0.5 * math.log(0.5 / m) for m in mixture),
        PointwiseRule("skew_reverse", 0.7): sum(
            p * math.log(p / m) for p, m in zip((0.75, 0.25), mixture, strict=True)
        ),
        PointwiseRule("forward", clip=0.05): 0.5 * math.log(2 / 3) + 0.05,
        PointwiseRule("reverse", clip=0.05): 0.05 + 0.25 * math.log(0.5),
    }
    for rule, value in expected.items():
        sums = linear_pointwise_stats(one, student, one, teacher, stats, rule, shard=shard, options=tiles)
        assert sums[:, 0].tolist()[0] == pytest.approx(value, abs=1e-6), rule
        assert sums[:, 0].tolist()[2:] == pytest.approx([1.0, 0.5], abs=1e-6)
    rule = PointwiseRule("forward", clip=0.05)
    sums = linear_pointwise_stats(one, student, one, teacher, stats, rule, shard=shard, options=tiles)
    assert sums[1].item() == pytest.approx(-0.5, abs=1e-6)
    _, dw = linear_pointwise_grads(
        one, student, one, teacher, stats, sums[1] / sums[2], torch.ones(1), rule, shard=shard, options=tiles
    )
    assert dw is not None and dw[:, 0].tolist() == pytest.approx([-0.125, 0.125], abs=1e-6)


@every_rule
@pytest.mark.parametrize(("ranks", "temperature"), [(1, 1.0), (2, 0.7), (4, 1.1)])
def test_values_and_gradients(
    tiles_and_dtype: tuple[TileOptions, torch.dtype], rule: PointwiseRule, ranks: int, temperature: float
) -> None:
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    expected, expected_dh, expected_dw = oracle(problem, rule, temperature)
    stats = finalize(merged_state(problem, ranks, temperature=temperature, options=tiles))
    sums = summed(problem, stats, rule, ranks, temperature=temperature, options=tiles)
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    assert float((sums[0] - expected).abs().max()) <= TOLERANCE[dtype]
    dh, shards = torch.zeros_like(expected_dh), []
    for local, shard in (problem.local(rank, ranks) for rank in range(ranks)):
        # A float32 target shows the sums themselves, before any rounding to the weight's dtype.
        target = torch.zeros(local.student_weight.shape, dtype=sums.dtype)
        partial, none = linear_pointwise_grads(
            *pair(local), stats, sums[1] / sums[2], local.coefficients[:, 0].contiguous(), rule,
            shard=shard, temperature=temperature, options=tiles, weight_grad=target,
        )  # fmt: skip
        assert none is None and partial.dtype == target.dtype
        dh += partial
        shards.append(target)
    dw = torch.cat(shards)
    assert relative_error(dh, expected_dh) <= TOLERANCE[dtype]
    assert relative_error(dw, expected_dw) <= TOLERANCE[dtype]
    assert not dw[problem.valid :].any()


@every_rule
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_finite_differences_of_the_loss(backend: str, rule: PointwiseRule) -> None:
    """Knows nothing of the formulas: the values are those of the definition, by the test above."""
    reason = BACKENDS[backend].unavailable(torch.device("cpu"), torch.float64)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    problem = make_problem(
        tokens=4, valid=13, padded=16, student_width=3, teacher_width=2, dtype=torch.float64
    )
    weight, hidden = Parameter(problem.student_weight), problem.student_hidden.requires_grad_()
    settings = {"temperature": 0.8, "options": small_tiles(backend)}
    assert torch.autograd.gradcheck(
        lambda h, w: run_pointwise(problem, h, w, rule, **settings).loss, (hidden, weight)
    )


def test_the_rules_clamp_some_entries_and_not_others() -> None:
    """Else the tests above would say little about the clip."""
    problem = make_problem()
    for rule in POINTWISE_RULES:
        if rule.clip is None:
            continue
        free, _, _ = oracle(problem, replace(rule, clip=None), 1.0)
        clamped, _, _ = oracle(problem, rule, 1.0)
        bound = problem.valid * (rule.clip or 0)
        assert bool((clamped <= free + 1e-12).all()) and bool((clamped < bound / 2).all())
        assert int((clamped < free - 1e-3).sum()) >= 8, rule


def close_models() -> Problem:
    """Ratios of probabilities up to about 20: limits are reached at shares that float64 can resolve."""
    problem = make_problem(dtype=torch.float64)
    problem.student_weight.mul_(0.25)
    problem.teacher_weight.mul_(0.25)
    return problem


def divergences(rule: PointwiseRule, problem: Problem) -> Tensor:
    stats = finalize(merged_state(problem, 1))
    return summed(problem, stats, rule, 1)[0]


def test_limits_of_jsd() -> None:
    """JSD_b / b to the forward divergence, JSD_b / (1-b) to the reverse one; never above ln 2."""
    problem = close_models()
    stats = finalize(merged_state(problem, 1))
    distances = []
    for small in (1e-2, 1e-4, 1e-6):
        forward = divergences(PointwiseRule("jsd", small), problem) / small
        reverse = divergences(PointwiseRule("jsd", 1 - small), problem) / small
        distances.append(
            (relative_error(forward, stats.forward_kl), relative_error(reverse, stats.reverse_kl))
        )
    for nearer, farther in zip(distances[1:], distances, strict=False):
        assert nearer[0] < farther[0] / 50 and nearer[1] < farther[1] / 50
    assert max(distances[-1]) <= 1e-4
    for share in (0.1, 0.5, 0.9):
        values = divergences(PointwiseRule("jsd", share), make_problem(dtype=torch.float64))
        assert bool((values > 0).all()) and bool((values <= math.log(2)).all())


def test_limits_of_the_skew_divergences() -> None:
    """A mixture of almost only the other model: the plain divergence."""
    problem = close_models()
    stats = finalize(merged_state(problem, 1))
    forward = divergences(PointwiseRule("skew_forward", 1e-6), problem)
    reverse = divergences(PointwiseRule("skew_reverse", 1e-6), problem)
    assert relative_error(forward, stats.forward_kl) <= 1e-4
    assert relative_error(reverse, stats.reverse_kl) <= 1e-4


def test_without_a_clip_the_plain_divergences_are_those_of_pass_1(tiles: TileOptions) -> None:
    problem = make_problem()
    stats = finalize(merged_state(problem, 1, options=tiles))
    for rule, expected in (
        (PointwiseRule("forward"), stats.forward_kl),
        (PointwiseRule("reverse"), stats.reverse_kl),
    ):
        sums = summed(problem, stats, rule, 1, options=tiles)
        assert float((sums[0] - expected).abs().max()) <= 1e-5


def test_the_gap_and_the_mass(tiles_and_dtype: tuple[TileOptions, torch.dtype]) -> None:
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    stats = finalize(merged_state(problem, 1, options=tiles))
    sums = summed(problem, stats, POINTWISE_RULES[1], 2, options=tiles)
    models = ("student", "teacher")
    p, q = (
        (getattr(problem, f"{m}_hidden").double() @ getattr(problem, f"{m}_weight")[:117].double().t()).softmax(1)
        for m in models
    )  # fmt: skip
    assert float((sums[3] - (p - q).abs().sum(1)).abs().max()) <= TOLERANCE[dtype]
    assert float((sums[2] - 1).abs().max()) <= TOLERANCE[dtype]


@every_rule
def test_vanishing_probabilities(tiles: TileOptions, rule: PointwiseRule) -> None:
    """Three tokens of logits 1e4 apart: the models agree, or each puts everything where the other has nothing."""
    one = torch.ones(1, 1)
    shard = VocabShard(0, 3)
    for student, teacher in (
        ((1e4, 0.0, -1e4), (1e4, -1e4, 0.0)),
        ((1e4, 0.0, -1e4), (-1e4, 0.0, 1e4)),
    ):
        weights = torch.tensor(student)[:, None], torch.tensor(teacher)[:, None]
        inputs = one, weights[0], one, weights[1]
        stats = finalize(linear_stats(*inputs, torch.tensor([0]), shard=shard, options=tiles))
        sums = linear_pointwise_stats(*inputs, stats, rule, shard=shard, options=tiles)
        _, dw = linear_pointwise_grads(
            *inputs, stats, sums[1] / sums[2], torch.ones(1), rule, shard=shard, options=tiles
        )
        assert dw is not None and bool(torch.isfinite(sums).all()) and bool(torch.isfinite(dw).all())
        mixed = {"jsd": -math.log(0.5), "skew_forward": -math.log(0.1), "skew_reverse": -math.log(0.1)}
        value = 0.0 if student[0] == teacher[0] else mixed.get(rule.kind, 2e4)
        if rule.clip is None:
            assert sums[0].item() == pytest.approx(value, rel=1e-6, abs=1e-6)
        else:
            # One entry is clamped, or of jsd those of both models.
            entries = 2 if rule.kind == "jsd" else 1
            assert sums[0].item() == pytest.approx(0.0 if value == 0 else entries * rule.clip, abs=1e-6)


def test_equal_models_have_no_divergence(tiles: TileOptions) -> None:
    problem = make_problem()
    problem = replace(
        problem, teacher_hidden=problem.student_hidden.clone(), teacher_weight=problem.student_weight.clone()
    )
    for rule in POINTWISE_RULES:
        weight, hidden = Parameter(problem.student_weight), problem.student_hidden.clone().requires_grad_()
        output = run_pointwise(problem, hidden, weight, rule, options=tiles)
        output.loss.backward()
        assert float(output.stats.divergence.detach().abs().max()) <= 2e-6
        assert hidden.grad is not None and float(hidden.grad.abs().max()) <= 1e-5


def test_unchecked_nan_reaches_its_tokens_numbers_and_no_others(tiles: TileOptions) -> None:
    """A clip must not turn it into a number."""
    problem = make_problem()
    problem.student_hidden[4, 2] = float("nan")
    stats = finalize(linear_stats(*problem.inputs(), shard=problem.shard(), options=tiles))
    for rule in POINTWISE_RULES:
        sums = linear_pointwise_stats(*pair(problem), stats, rule, shard=problem.shard(), options=tiles)
        for row in sums:
            assert row.isnan().nonzero()[:, 0].tolist() == [4], rule
        dh, _ = linear_pointwise_grads(
            *pair(problem), stats, sums[1] / sums[2], torch.ones(19), rule, shard=problem.shard(), options=tiles
        )  # fmt: skip
        assert dh.isnan().any(1).nonzero()[:, 0].tolist() == [4], rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, r"PointwiseRule.kind is 'kl', wanted one of \('jsd', 'skew_forward', .*'reverse'\)"),
        (
            {"kind": "forward", "share": 0.5},
            r"PointwiseRule.share is 0.5, wanted None: kind 'forward' has no",
        ),
        ({"kind": "jsd"}, r"PointwiseRule.share is None, wanted 0 < share < 1 for kind 'jsd' \(the ends are"),
        ({"kind": "jsd", "share": 0.0}, r"PointwiseRule.share is 0.0, wanted 0 < share < 1 for kind 'jsd'"),
        ({"kind": "skew_forward", "share": 1}, r"share is 1, wanted 0 < share < 1 for kind 'skew_forward'"),
        ({"kind": "jsd", "share": float("nan")}, r"PointwiseRule.share is nan, wanted 0 < share < 1"),
        ({"kind": "reverse", "clip": 0.0}, r"PointwiseRule.clip is 0.0, wanted > 0 and finite, or None for"),
        ({"kind": "reverse", "clip": float("inf")}, r"PointwiseRule.clip is inf, wanted > 0 and finite"),
        ({"kind": "reverse", "clip": float("nan")}, r"PointwiseRule.clip is nan, wanted > 0 and finite"),
    ],
)
def test_wrong_rules(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointwiseRule(**arguments)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    problem, rule = make_problem(), POINTWISE_RULES[0]
    stats = finalize(merged_state(problem, 1))
    shard = problem.shard()
    with pytest.raises(
        ValueError, match=r"coefficients is float32 of shape \(19, 4\), wanted float32 of shape \(19,\)$"
    ):
        linear_pointwise_grads(
            *pair(problem), stats, torch.zeros(19), problem.coefficients, rule, shard=shard
        )
    with pytest.raises(ValueError, match=r"mean has shape \(18,\), wanted 19 rows like student_hidden"):
        linear_pointwise_grads(*pair(problem), stats, torch.zeros(18), torch.zeros(19), rule, shard=shard)
    with pytest.raises(
        ValueError, match=r"stats.student_lse is float32 of shape \(18,\), wanted shape \(19,\)"
    ):
        short = TokenStats(*(value[:18] for value in stats))
        linear_pointwise_stats(*pair(problem), short, rule, shard=shard)
    with pytest.raises(
        ValueError, match=r"weight_grad is float32 of shape \(3, 16\), wanted shape \(128, 16\)"
    ):
        linear_pointwise_grads(
            *pair(problem), stats, torch.zeros(19), torch.zeros(19), rule, shard=shard,
            weight_grad=torch.zeros(3, 16),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"teacher_hidden is .*\(18, 24\), wanted 19 rows"):
        wrong = replace(problem, teacher_hidden=torch.zeros(18, 24))
        linear_pointwise_stats(*pair(wrong), stats, rule, shard=shard)
    with pytest.raises(ValueError, match=r"temperature is 0.0, wanted > 0"):
        linear_pointwise_stats(*pair(problem), stats, rule, shard=shard, temperature=0.0)
