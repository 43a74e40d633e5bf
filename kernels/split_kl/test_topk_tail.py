"""Divergences with a tail bucket against torch autograd of their definition, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sead_kernels.split_kl import (
    EntropyStats,
    TileOptions,
    TopKTarget,
    VocabShard,
    finalize,
    finalize_entropy,
    linear_entropy,
    linear_support_grads,
    topk_tail_gradient,
    topk_tail_loss,
    topk_tail_stats,
)
from sead_kernels.split_kl.testing import (
    SMALL_TILES,
    Problem,
    make_problem,
    merged_entropy,
    merged_state,
    relative_error,
)
from torch import Tensor
from torch.nn import Parameter

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-5}


def teacher_target(problem: Problem, topk: int, temperature: float) -> TopKTarget:
    """From the dense float64 teacher."""
    logits = problem.teacher_hidden.double() @ problem.teacher_weight[: problem.valid].double().t()
    logprobs, ids = (logits / temperature).log_softmax(-1).sort(dim=1, descending=True)
    return TopKTarget(ids[:, :topk], logprobs[:, :topk], logprobs[:, topk:].exp().sum(1))


def dense_tail_loss(
    problem: Problem, hidden: Tensor, weight: Tensor, target: TopKTarget, temperature: float
) -> tuple[Tensor, Tensor]:
    """(scalar loss, the four terms [T, 4]), built from log_softmax alone."""
    log_p = (hidden.double() @ weight[: problem.valid].double().t() / temperature).log_softmax(-1)
    p_s, q_s = log_p.gather(1, target.ids).exp(), target.logprobs.exp()
    p_tail, q_tail = 1 - p_s.sum(1), target.tail_mass
    forward = (q_s * (q_s / p_s).log()).sum(1) + q_tail * (q_tail / p_tail).log()
    reverse = (p_s * (p_s / q_s).log()).sum(1) + p_tail * (p_tail / q_tail).log()
    entropy = -(log_p.exp() * log_p).sum(1)
    terms = torch.stack([forward, reverse, entropy, log_p.gather(1, problem.labels[:, None])[:, 0]], dim=1)
    return (problem.coefficients.double() * terms).sum(), terms.detach()


def student_pass(
    problem: Problem, target: TopKTarget, ranks: int, temperature: float, tiles: TileOptions
) -> EntropyStats:
    merged = merged_entropy(
        problem, ranks, model="student", temperature=temperature, gather_ids=target.ids, options=tiles
    )
    return finalize_entropy(merged, problem.valid)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("topk", [1, 8, 64])
def test_values_and_gradients(
    tiles_and_dtype: tuple[TileOptions, torch.dtype], ranks: int, temperature: float, topk: int
) -> None:
    """Sampled tokens inside and outside the support; all four terms."""
    tiles, dtype = tiles_and_dtype
    problem = make_problem(dtype=dtype)
    target = teacher_target(problem, topk, temperature)
    inside = (target.ids == problem.labels[:, None]).any(1)
    if topk == 64:
        assert inside.any() and not inside.all()
    hidden = problem.student_hidden.double().requires_grad_()
    weight = problem.student_weight.double().requires_grad_()
    loss, terms = dense_tail_loss(problem, hidden, weight, target, temperature)
    loss.backward()
    student = student_pass(problem, target, ranks, temperature, tiles)
    stats = topk_tail_stats(student, target)
    assert float((stats.forward_kl - terms[:, 0]).abs().max()) <= TOLERANCE[dtype]
    assert float((stats.reverse_kl - terms[:, 1]).abs().max()) <= TOLERANCE[dtype]
    gradient = topk_tail_gradient(student, target, stats, problem.labels, problem.coefficients)
    dh, shards = torch.zeros_like(hidden), []
    for rank in range(ranks):
        local, shard = problem.local(rank, ranks)
        sums = torch.zeros(local.student_weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        partial, _ = linear_support_grads(
            local.student_hidden,
            local.student_weight,
            gradient,
            shard=shard,
            temperature=temperature,
            options=tiles,
            weight_grad=sums,
        )
        dh += partial
        shards.append(sums)
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(dh, hidden.grad) <= TOLERANCE[dtype]
    assert relative_error(torch.cat(shards), weight.grad) <= TOLERANCE[dtype]


def test_autograd_node(tiles: TileOptions) -> None:
    """Value, factor grad_output, dropped rows; a main_grad is added to."""
    problem = make_problem()
    target = teacher_target(problem, 8, 1.0)
    hidden64 = problem.student_hidden.double().requires_grad_()
    weight64 = problem.student_weight.double().requires_grad_()
    loss, _ = dense_tail_loss(problem, hidden64, weight64, target, 1.0)
    (loss * 0.37).backward()
    assert hidden64.grad is not None and weight64.grad is not None
    for main_grad in (None, torch.full(problem.student_weight.shape, 3.0)):
        weight, hidden = (
            Parameter(problem.student_weight.clone()),
            problem.student_hidden.clone().requires_grad_(),
        )
        if main_grad is not None:
            vars(weight).update(main_grad=main_grad, grad_added_to_main_grad=False)
        output = topk_tail_loss(
            hidden, weight, target, problem.labels, problem.coefficients, shard=problem.shard(), tp_group=None,
            options=tiles,
        )  # fmt: skip
        (output.loss * 0.37).backward()
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert output.active.tolist() == [t for t in range(19) if t % 3]
        assert hidden.grad is not None and weight.grad is not None and not hidden.grad[::3].any()
        assert relative_error(hidden.grad, hidden64.grad) <= 1e-5
        weight_grad = weight.grad if main_grad is None else main_grad - 3
        assert relative_error(weight_grad, weight64.grad) <= 1e-5


def test_the_target_of_a_teacher_pass(tiles: TileOptions) -> None:
    """The float32 pass gives what the dense float64 teacher gives, and the loss hardly differs."""
    problem = make_problem()
    inputs = (problem.teacher_hidden, problem.teacher_weight, problem.labels)
    state = linear_entropy(*inputs, shard=problem.shard(), topk=8, options=tiles)
    target, wanted = TopKTarget.of(finalize_entropy(state, problem.valid)), teacher_target(problem, 8, 1.0)
    assert torch.equal(target.ids, wanted.ids)
    assert float((target.logprobs - wanted.logprobs).abs().max()) <= 2e-6
    assert float((target.tail_mass - wanted.tail_mass).abs().max()) <= 5e-7
    with pytest.raises(ValueError, match="teacher has no top-k"):
        TopKTarget.of(finalize_entropy(linear_entropy(*inputs, shard=problem.shard()), problem.valid))


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


def test_strided_support(tiles: TileOptions) -> None:
    """The kernels read ids and values by row: transposed tensors must not reach them as they are."""
    problem = make_problem()
    target = teacher_target(problem, 8, 1.0)
    student = student_pass(problem, target, 1, 1.0, tiles)
    stats = topk_tail_stats(student, target)
    gradient = topk_tail_gradient(student, target, stats, problem.labels, problem.coefficients)
    strided = replace(
        gradient, ids=gradient.ids.t().contiguous().t(), values=gradient.values.t().contiguous().t()
    )
    inputs = (problem.student_hidden, problem.student_weight)
    expected = linear_support_grads(*inputs, gradient, shard=problem.shard(), options=tiles)
    actual = linear_support_grads(*inputs, strided, shard=problem.shard(), options=tiles)
    assert torch.equal(actual[0], expected[0])
    assert actual[1] is not None and expected[1] is not None and torch.equal(actual[1], expected[1])


def test_nothing_active() -> None:
    problem = make_problem()
    problem.coefficients.zero_()
    weight, hidden = Parameter(problem.student_weight), problem.student_hidden.requires_grad_()
    output = topk_tail_loss(
        hidden, weight, teacher_target(problem, 4, 1.0), problem.labels, problem.coefficients,
        shard=problem.shard(), tp_group=None,
    )  # fmt: skip
    output.loss.backward()
    assert output.loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_bounds_of_the_full_divergences() -> None:
    """Coarser partitions lose divergence (data processing inequality); at k = V nothing is lost."""
    problem = make_problem(dtype=torch.float64)
    exact = finalize(merged_state(problem, 1))
    previous = torch.zeros(19, dtype=torch.float64)
    for topk in (1, 4, 16, 64, 117):
        target = teacher_target(problem, topk, 1.0)
        stats = topk_tail_stats(student_pass(problem, target, 1, 1.0, SMALL_TILES), target)
        assert bool((stats.forward_kl <= exact.forward_kl + 1e-9).all())
        assert bool((stats.reverse_kl <= exact.reverse_kl + 1e-9).all())
        assert bool((stats.forward_kl >= previous - 1e-9).all())
        previous = stats.forward_kl
    torch.testing.assert_close(previous, exact.forward_kl, rtol=1e-6, atol=1e-9)


def test_a_vanishing_tail_gives_finite_numbers() -> None:
    """Both models put all mass on the support: 1 minus the sum is rounding, and is floored."""
    problem = make_problem()
    problem.student_weight.mul_(40)
    problem.teacher_weight.mul_(40)
    target = teacher_target(problem, 8, 1.0)
    target = TopKTarget(target.ids, target.logprobs.float(), target.tail_mass.float())
    student = student_pass(problem, target, 1, 1.0, SMALL_TILES)
    stats = topk_tail_stats(student, target)
    gradient = topk_tail_gradient(student, target, stats, problem.labels, problem.coefficients)
    assert all(bool(torch.isfinite(value).all()) for value in stats)
    assert bool(torch.isfinite(gradient.offset).all()) and bool(torch.isfinite(gradient.values).all())


def test_wrong_arguments() -> None:
    problem = make_problem()
    target = teacher_target(problem, 4, 1.0)
    student = student_pass(problem, target, 1, 1.0, SMALL_TILES)
    with pytest.raises(ValueError, match=r"support_logprobs has shape \(19, 4\) .*wanted \(19, 5\)"):
        topk_tail_stats(student, teacher_target(problem, 5, 1.0))
    with pytest.raises(ValueError, match=r"gather_ids is int32 of shape \(19, 4\) .*, wanted int64"):
        linear_entropy(
            problem.student_hidden, problem.student_weight, problem.labels, shard=problem.shard(),
            gather_ids=target.ids.int(),
        )  # fmt: skip
    gradient = topk_tail_gradient(
        student, target, topk_tail_stats(student, target), problem.labels, problem.coefficients
    )
    with pytest.raises(ValueError, match=r"gradient.slope is .*\(3,\), wanted shape \(19,\)"):
        wrong = replace(gradient, slope=torch.zeros(3))
        linear_support_grads(problem.student_hidden, problem.student_weight, wrong, shard=problem.shard())
    with pytest.raises(ValueError, match=r"gradient.values has shape \(19, 1\), wanted \(19, 5\)"):
        wrong = replace(gradient, values=torch.zeros(19, 1))
        linear_support_grads(problem.student_hidden, problem.student_weight, wrong, shard=problem.shard())

    def loss_of(ids: Tensor) -> None:
        topk_tail_loss(
            problem.student_hidden, problem.student_weight, target._replace(ids=ids), problem.labels,
            problem.coefficients, shard=problem.shard(), tp_group=None,
        )  # fmt: skip

    for wrong_id in (-1, 117):
        ids = target.ids.clone()
        ids[4, 2] = wrong_id
        with pytest.raises(ValueError, match=rf"target.ids lie in \[.*{wrong_id}.*\], wanted \[0, 117\)"):
            loss_of(ids)
    repeated = target.ids.clone()
    repeated[4, 2] = repeated[4, 0]
    with pytest.raises(ValueError, match=r"target\.ids has a repeated id in a row, wanted distinct ones"):
        loss_of(repeated)
    with pytest.raises(ValueError, match=r"target.ids has shape \(18, 4\), wanted 19 rows"):
        short = target._replace(ids=target.ids[1:])
        topk_tail_loss(
            problem.student_hidden, problem.student_weight, short, problem.labels, problem.coefficients,
            shard=problem.shard(), tp_group=None,
        )  # fmt: skip
