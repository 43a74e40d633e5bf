"""Megatron's weight-gradient protocol, with Megatron's own DistributedDataParallel and its own hook.

The hook (megatron-core 0.16.1, ``_make_backward_post_hook``) adds ``param.grad`` to ``main_grad`` unless
``grad_added_to_main_grad`` is set and ``zero_out_wgrad`` is not. Expected sums come from plain autograd in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sead_kernels.split_kl import PointwiseRule, split_kl_loss
from sead_kernels.split_kl.reference import dense_gradients, dense_loss, dense_pointwise
from sead_kernels.split_kl.testing import (
    POINTWISE_RULES,
    SMALL_TILES,
    Problem,
    make_problem,
    relative_error,
    run_pointwise,
)
from torch import Tensor, nn

pytest.importorskip("megatron.core", reason="the protocol under test is Megatron's")
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("gloo") / "store"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def buffers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron allocates its gradient buffers on the current CUDA device and offers no other choice."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


class Head(nn.Module):
    """An output layer, and the same matrix as an embedding of ``ids`` if tied; without a rule the split-KL loss."""

    def __init__(self, problem: Problem, tied: bool, rule: PointwiseRule | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.student_weight.clone())
        self.problem, self.tied, self.rule = problem, tied, rule

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        problem = self.problem
        if self.tied:
            hidden = hidden + nn.functional.embedding(ids, self.weight)
        if self.rule is not None:
            return run_pointwise(problem, hidden, self.weight, self.rule, weight_tied=self.tied).loss
        return split_kl_loss(
            hidden,
            self.weight,
            problem.teacher_hidden,
            problem.teacher_weight,
            problem.labels,
            problem.coefficients,
            shard=problem.shard(),
            tp_group=None,
            options=SMALL_TILES,
            weight_tied=self.tied,
        ).loss


def wrap(head: Head, *, reduce_in_fp32: bool = True) -> DistributedDataParallel:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=reduce_in_fp32, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(config, ddp, head)
    wrapped.zero_grad_buffer()
    return wrapped


def expected_tied_gradient(problem: Problem, ids: Tensor) -> Tensor:
    weight = problem.student_weight.double().requires_grad_()
    hidden = problem.student_hidden.double() + nn.functional.embedding(ids, weight)
    loss = dense_loss(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
        problem.coefficients,
        valid=problem.valid,
    )
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_untied_weight_is_added_once_per_microbatch(zero_out_wgrad: bool, microbatches: int) -> None:
    problem = make_problem()
    wrapped = wrap(Head(problem, tied=False))
    weight = wrapped.module.weight
    weight.zero_out_wgrad = zero_out_wgrad
    ids = torch.arange(19)
    for _ in range(microbatches):
        wrapped(problem.student_hidden.clone().requires_grad_(), ids).backward()
    _, expected = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    assert weight.grad is None, "the hook has not fired"
    assert weight.grad_added_to_main_grad
    assert relative_error(weight.main_grad, microbatches * expected) <= 1e-5


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_tied_weight_keeps_the_embeddings_gradient(zero_out_wgrad: bool, microbatches: int) -> None:
    problem = make_problem()
    wrapped = wrap(Head(problem, tied=True))
    weight = wrapped.module.weight
    weight.zero_out_wgrad = zero_out_wgrad
    ids = torch.arange(19) % 11
    for _ in range(microbatches):
        wrapped(problem.student_hidden.clone().requires_grad_(), ids).backward()
    expected = expected_tied_gradient(problem, ids)
    assert weight.grad is None, "the hook has not fired"
    assert not weight.grad_added_to_main_grad
    assert relative_error(weight.main_grad, microbatches * expected) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_the_pointwise_loss_keeps_the_protocol(tied: bool) -> None:
    problem, rule, ids = make_problem(), POINTWISE_RULES[1], torch.arange(19) % 11
    wrapped = wrap(Head(problem, tied, rule))
    weight = wrapped.module.weight
    for _ in range(2):
        wrapped(problem.student_hidden.clone().requires_grad_(), ids).backward()
    exact = problem.student_weight.double().requires_grad_()
    hidden = problem.student_hidden.double()
    if tied:
        hidden = hidden + nn.functional.embedding(ids, exact)
    divergence = dense_pointwise(hidden, exact, *problem.inputs()[2:4], rule, valid=problem.valid)
    (expected,) = torch.autograd.grad((problem.coefficients[:, 0].double() * divergence).sum(), exact)
    assert weight.grad is None, "the hook has not fired"
    assert weight.grad_added_to_main_grad == (not tied)
    assert relative_error(weight.main_grad, 2 * expected) <= 1e-5


def test_bf16_weight_with_float32_main_grad_is_not_rounded_to_bf16() -> None:
    problem = make_problem(dtype=torch.bfloat16)
    wrapped = wrap(Head(problem, tied=False))
    weight = wrapped.module.weight
    assert weight.main_grad.dtype == torch.float32
    wrapped(problem.student_hidden.clone().requires_grad_(), torch.arange(19)).backward()
    _, expected = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    assert relative_error(weight.main_grad, expected) <= 1e-5


def test_bf16_main_grad_is_rounded_once_per_call() -> None:
    """Half an ulp of bf16 is at most 2^-8 of the entry; a rounding per token tile (three here) exceeds it."""
    problem = make_problem(dtype=torch.bfloat16)
    wrapped = wrap(Head(problem, tied=False), reduce_in_fp32=False)
    weight = wrapped.module.weight
    assert weight.main_grad.dtype == torch.bfloat16
    earlier = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight.main_grad.copy_(earlier)
    wrapped(problem.student_hidden.clone().requires_grad_(), torch.arange(19)).backward()
    _, expected = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    expected += earlier.double()
    error = (weight.main_grad.double() - expected).abs()
    assert bool((error <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all())


def test_main_grad_without_ddp_leaves_a_harmless_gradient() -> None:
    problem = make_problem()
    head = Head(problem, tied=False)
    main_grad = vars(head.weight)["main_grad"] = torch.zeros(head.weight.shape)
    head(problem.student_hidden.clone().requires_grad_(), torch.arange(19)).backward()
    _, expected = dense_gradients(*problem.inputs(), problem.coefficients, valid=problem.valid)
    assert relative_error(main_grad, expected) <= 1e-5
    assert head.weight.grad is not None and not head.weight.grad.any()
