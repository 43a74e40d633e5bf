"""The rules of the top-k losses: published formulas by finite differences and by hand, limits, rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    COEFFICIENTS,
    RULES,
    TileOptions,
    TopKTarget,
    VocabShard,
    finalize,
    finalize_entropy,
    linear_entropy,
    topk_loss,
)
from sead_kernels.split_kl.reference import dense_gradients, dense_stats, topk_divergences
from sead_kernels.split_kl.testing import coefficients_of, make_problem, merged_state, relative_error
from sead_kernels.split_kl.topk_testing import dense_target, stats_and_gradient, topk_step


@pytest.mark.parametrize("rule", RULES)
def test_finite_differences_of_the_published_formula(rule: str) -> None:
    """With hidden states that are the logits and a unit weight, dh is dz. Advantages are those of the start."""
    generator = torch.Generator().manual_seed(5)
    tokens, vocabulary, h = 6, 12, 1e-5
    z, w = (2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    log_q = w.log_softmax(1)
    logprobs, ids = log_q.topk(4, dim=1)
    target = TopKTarget(ids, logprobs, 1 - logprobs.exp().sum(1))
    old = z.log_softmax(1)
    for name in RULES[rule].divergences:
        column = COEFFICIENTS.index(name)
        wanted = torch.zeros_like(z)
        for t in range(tokens):
            for v in range(vocabulary):
                ends = []
                for sign in (1, -1):
                    moved = z[t].clone()
                    moved[v] += sign * h
                    log_p = moved.log_softmax(0)
                    ends.append(topk_divergences(rule, log_p, log_q[t], ids[t], old[t])[column])
                wanted[t, v] = (ends[0] - ends[1]) / (2 * h)
        coefficients = torch.zeros(tokens, 4, dtype=torch.float64)
        coefficients[:, column] = 1
        hidden = z.clone().requires_grad_()
        topk_loss(
            hidden, torch.eye(vocabulary, dtype=torch.float64), target, torch.zeros(tokens, dtype=torch.int64),
            coefficients, rule=rule, shard=VocabShard(0, vocabulary), tp_group=None,
        ).loss.backward()  # fmt: skip
        assert hidden.grad is not None
        assert float((hidden.grad - wanted).abs().max()) <= 1e-9
        # A loss of probabilities alone does not change with a constant added to all logits.
        assert float(hidden.grad.sum(1).abs().max()) <= 1e-14
        off = torch.ones_like(z, dtype=torch.bool).scatter_(1, ids, False)
        assert bool(hidden.grad[off].any()) == (rule != "reverse_both_norm")


def test_values_by_hand() -> None:
    """p = (1/2, 3/10, 1/5), q = (3/5, 1/10, 3/10), S = {0, 2}: p~ = (5/7, 2/7), q~ = (2/3, 1/3)."""
    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64).log()
    ids = torch.tensor([[0, 2]])
    target = TopKTarget(ids, log_q.gather(1, ids), torch.tensor([0.1], dtype=torch.float64))
    log = math.log
    wanted = {
        "tail": (
            0.6 * log(0.6 / 0.5) + 0.3 * log(0.3 / 0.2) + 0.1 * log(0.1 / 0.3),
            0.5 * log(0.5 / 0.6) + 0.2 * log(0.2 / 0.3) + 0.3 * log(0.3 / 0.1),
        ),
        "forward_teacher_norm": (2 / 3 * log(2 / 3 / 0.5) + 1 / 3 * log(1 / 3 / 0.2), None),
        "forward_raw": (0.6 * log(0.6 / 0.5) + 0.3 * log(0.3 / 0.2), None),
        "reverse_both_norm": (None, 5 / 7 * log(5 / 7 / (2 / 3)) + 2 / 7 * log(2 / 7 / (1 / 3))),
        "student_topk_policy": (None, 5 / 7 * log(0.5 / 0.6) + 2 / 7 * log(0.2 / 0.3)),
        "student_topk_policy_teacher": (None, 2 / 3 * log(0.5 / 0.6) + 1 / 3 * log(0.2 / 0.3)),
        "student_topk_policy_unweighted": (None, log(0.5 / 0.6) + log(0.2 / 0.3)),
    }
    assert wanted.keys() == RULES.keys()
    for rule, pair in wanted.items():
        stats = topk_loss(
            log_p, torch.eye(3, dtype=torch.float64), target, torch.tensor([1]), torch.tensor([[0.0, 0, 0, 1]]),
            rule=rule, shard=VocabShard(0, 3), tp_group=None,
        ).stats  # fmt: skip
        for name, value in zip(COEFFICIENTS[:2], pair, strict=True):
            actual = getattr(stats, name)
            assert (actual is None) == (value is None)
            assert value is None or float(actual) == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize(
    ("rule", "column"),
    [("forward_teacher_norm", 0), ("forward_raw", 0), ("reverse_both_norm", 1), ("student_topk_policy", 1)],
)
def test_the_whole_vocabulary_gives_the_full_divergence(rule: str, column: int) -> None:
    """Of ``tail``, test_bounds_of_the_full_divergences: its tails are floored."""
    problem = make_problem(dtype=torch.float64)
    coefficients = coefficients_of(rule, problem)
    output, hidden_grad, weight_grad = topk_step(problem, dense_target(problem, 117), rule)
    full = dense_stats(*problem.inputs(), valid=problem.valid)
    value = getattr(output.stats, COEFFICIENTS[column])
    exact = getattr(full, COEFFICIENTS[column])
    torch.testing.assert_close(value, exact[output.active], rtol=0, atol=1e-12)
    dh, dw = dense_gradients(*problem.inputs(), coefficients, valid=problem.valid)
    assert relative_error(hidden_grad, dh) <= 1e-11
    assert relative_error(weight_grad, dw) <= 1e-11


def test_the_tail_mass_has_the_rounding_of_the_sum_alone(tiles: TileOptions) -> None:
    """Logits near 30: 1 - sum_k exp(z - lse) would carry the rounding of lse, and of k additions."""
    generator = torch.Generator().manual_seed(4)
    weight = 30 + 3 * torch.randn(4096, 1, generator=generator)
    state = linear_entropy(
        torch.ones(1, 1),
        weight,
        torch.tensor([0]),
        shard=VocabShard(0, 4096),
        topk=128,
        options=replace(tiles, vocab=1000),
    )
    stats = finalize_entropy(state, 4096)
    exact = (weight[:, 0].double()).softmax(0).sort(descending=True).values[128:].sum()
    assert stats.tail_mass is not None and state.topk_logits is not None
    uncentred = 1 - (state.topk_logits - stats.lse[:, None]).exp().sum(1)
    assert abs(float(stats.tail_mass - exact)) <= 1.5e-7 < abs(float(uncentred - exact))


def test_bounds_of_the_full_divergences() -> None:
    """Coarser partitions lose divergence (data processing inequality); at k = V nothing is lost."""
    problem = make_problem(dtype=torch.float64)
    exact = finalize(merged_state(problem, 1))
    previous = torch.zeros(19, dtype=torch.float64)
    for topk in (1, 4, 16, 64, 117):
        stats, _ = stats_and_gradient(problem, dense_target(problem, topk))
        assert stats.forward_kl is not None and stats.reverse_kl is not None
        assert bool((stats.forward_kl <= exact.forward_kl + 1e-9).all())
        assert bool((stats.reverse_kl <= exact.reverse_kl + 1e-9).all())
        assert bool((stats.forward_kl >= previous - 1e-9).all())
        previous = stats.forward_kl
    torch.testing.assert_close(previous, exact.forward_kl, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_vanishing_tail_gives_finite_numbers(rule: str) -> None:
    """Both models put all mass on a few tokens: 1 minus the sum is rounding, and is floored."""
    problem = make_problem()
    problem.student_weight.mul_(40)
    problem.teacher_weight.mul_(40)
    target = TopKTarget(
        *(column if column.dtype == torch.int64 else column.float() for column in dense_target(problem, 8))
    )
    stats, gradient = stats_and_gradient(problem, target, rule)
    assert all(bool(torch.isfinite(value).all()) for value in stats if value is not None)
    assert bool(torch.isfinite(gradient.offset).all()) and bool(torch.isfinite(gradient.values).all())


def test_eopd_in_one_pass() -> None:
    """arXiv 2603.07079: -A ln p(y) on every token plus alpha FKL on the gated ones, both over all valid tokens."""
    problem, alpha = make_problem(), 0.6
    target = dense_target(problem, 16)
    full = dense_stats(*problem.inputs(), valid=problem.valid)
    advantage, gate = full.teacher_logprob - full.student_logprob, full.teacher_entropy >= 3.0
    inside = (target.ids == problem.labels[:, None]).any(1)
    assert all(bool((gate == a).logical_and(inside == b).any()) for a in (0, 1) for b in (0, 1))
    coefficients = torch.zeros(19, 4)
    coefficients[:, COEFFICIENTS.index("forward_kl")] = alpha * gate / 19
    coefficients[:, COEFFICIENTS.index("logprob")] = -advantage / 19
    output, hidden_grad, weight_grad = topk_step(
        problem, target, "forward_teacher_norm", coefficients=coefficients
    )
    hidden = problem.student_hidden.double().requires_grad_()
    weight = problem.student_weight.double().requires_grad_()
    log_p = (hidden @ weight[: problem.valid].t()).log_softmax(1)
    policy = -(advantage * log_p.gather(1, problem.labels[:, None])[:, 0])
    q_norm = target.logprobs.softmax(1)
    forward = (q_norm * (q_norm.log() - log_p.gather(1, target.ids))).sum(1)
    loss = policy.mean() + alpha * forward[gate].sum() / 19
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert len(output.active) == 19
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(hidden_grad, hidden.grad) <= 1e-5
    assert relative_error(weight_grad, weight.grad) <= 1e-5
