"""Every backend of `kernels/split_kl` against the dense float64 oracle, in float32 and bfloat16.

Tolerances are those of the package's own tests (`kernels/split_kl/README.md`, `cuda/emulated_check.py`): statistics
2e-5 nats (a CPU's at 5003 tokens: 7e-6) and gradients 1e-5 of the largest entry in float32. With bfloat16 operands a
finished dz is rounded once, 2.2e-3 of the gradient's norm, and what an autograd node returns is rounded again, 3e-3
together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from sead_kernels.split_kl import (
    BACKENDS,
    PointwiseRule,
    TileOptions,
    TopKTarget,
    finalize,
    finalize_entropy,
    linear_split_kl_grads,
)
from sead_kernels.split_kl.reference import (
    dense_gradients,
    dense_pointwise,
    dense_stats,
    dense_topk_entropy,
    dense_topk_loss,
)
from sead_kernels.split_kl.testing import (
    Problem,
    coefficients_of,
    make_problem,
    merged_entropy,
    merged_state,
    relative_error,
    run_pointwise,
)
from sead_kernels.split_kl.topk_loss import topk_loss
from torch import Tensor
from torch.nn import Parameter

from gpu_checks.report import Context, Report, largest, relative_norm

STATISTICS = 2e-5
GRADIENTS = 1e-5
ROUNDED_DZ = 2.2e-3
ROUNDED_NODE = 3e-3

TOPK = 16
TOPK_RULES = ("tail", "forward_teacher_norm", "reverse_both_norm")
POINTWISE_RULES = (
    PointwiseRule("jsd", 0.5),
    PointwiseRule("skew_forward", 0.3, clip=0.05),
    PointwiseRule("skew_reverse", 0.1),
    PointwiseRule("reverse", clip=0.05),
)
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    """One backend on one dtype: the problem on the CPU (for the oracle) and on the device."""

    exact: Problem
    problem: Problem
    options: TileOptions
    report: Report
    label: str

    @property
    def is_bf16(self) -> bool:
        """Whether dz tiles are rounded to bfloat16: on a GPU they are, for bfloat16 operands."""
        return self.problem.student_hidden.dtype == torch.bfloat16

    def values(self, name: str, actual: Tensor, expected: Tensor, tolerance: float = STATISTICS) -> None:
        """Compares statistics, absolutely."""
        self.report.compare(f"{self.label} {name}", largest(actual, expected), tolerance)

    def gradient(self, name: str, actual: Tensor, expected: Tensor, rounded: float = ROUNDED_DZ) -> None:
        """Compares gradients: by the largest entry, or in the norm where dz was rounded."""
        if self.is_bf16:
            self.report.compare(f"{self.label} {name}", relative_norm(actual, expected), rounded)
        else:
            self.report.compare(f"{self.label} {name}", relative_error(actual.cpu(), expected), GRADIENTS)


def run(context: Context) -> None:
    """All backends that are there; of the others the reason."""
    on_gpu = context.device.type == "cuda"
    for name in ("torch", "cuda", "triton") if on_gpu else ("torch", "cpu"):
        started = time.monotonic()
        reason = BACKENDS[name].unavailable(context.device, torch.float32)
        if reason is not None:
            context.report.number(f"{name} unavailable", reason)
            continue
        context.report.number(f"{name} build seconds", round(time.monotonic() - started, 1))
        for dtype in (torch.float32, torch.bfloat16):
            case = _case(context, name, dtype)
            for check in CHECKS:
                with context.report.part(f"{case.label} {check.__name__}"):
                    check(case)
        context.report.number(f"{name} seconds", round(time.monotonic() - started, 1))


def _case(context: Context, backend: str, dtype: torch.dtype) -> Case:
    """Sizes that no tile divides; widths as TMA wants them. Logits have a standard deviation of 2 at every width."""
    if context.large:
        exact = make_problem(tokens=64, valid=2003, padded=2048, student_width=256, teacher_width=384)
        options = TileOptions(backend=backend, tokens=24, vocab=768)
    else:
        exact = make_problem(tokens=19, valid=117, padded=128, student_width=64, teacher_width=96)
        options = TileOptions(backend=backend, tokens=7, vocab=48)
    narrower = {"student_weight": (16 / exact.student_weight.shape[1]) ** 0.5}
    narrower["teacher_weight"] = (24 / exact.teacher_weight.shape[1]) ** 0.5
    scaled = replace(exact, **{name: getattr(exact, name) * scale for name, scale in narrower.items()})
    rounded = {
        field.name: getattr(scaled, field.name).to(dtype)
        for field in fields(Problem)
        if field.name.endswith(("hidden", "_weight"))
    }
    exact = replace(scaled, **rounded)
    tensors = {name: value.to(context.device) for name, value in vars(exact).items() if name != "valid"}
    label = f"{backend} {str(dtype).removeprefix('torch.')}"
    return Case(exact, replace(exact, **tensors), options, context.report, label)


def statistics(case: Case) -> None:
    """Pass 1: entropies, divergences, sampled log-probabilities; a shard in two parts."""
    expected = dense_stats(*case.exact.inputs(), valid=case.exact.valid, temperature=TEMPERATURE)
    state = merged_state(case.problem, 2, temperature=TEMPERATURE, options=case.options)
    for name, value in finalize(state)._asdict().items():
        case.values(name, value, getattr(expected, name))


def gradients(case: Case) -> None:
    """Pass 2 into a float32 `main_grad`."""
    problem, exact = case.problem, case.exact
    stats = finalize(merged_state(problem, 1, temperature=TEMPERATURE, options=case.options))
    main_grad = torch.zeros(problem.student_weight.shape, device=problem.labels.device)
    dh, _ = linear_split_kl_grads(
        *problem.inputs(),
        stats,
        problem.coefficients,
        shard=problem.shard(),
        temperature=TEMPERATURE,
        options=case.options,
        weight_grad=main_grad,
    )
    expected = dense_gradients(
        *exact.inputs(), exact.coefficients, valid=exact.valid, temperature=TEMPERATURE
    )
    case.gradient("dh", dh, expected[0])
    case.gradient("dW", main_grad, expected[1])


def top_k(case: Case) -> None:
    """The streamed list: by value, since float32 may order two logits that differ by rounding either way."""
    problem, exact = case.problem, case.exact
    merged = merged_entropy(problem, 2, temperature=TEMPERATURE, topk=TOPK, options=case.options)
    stats = finalize_entropy(merged, problem.valid)
    assert merged.topk_ids is not None and stats.topk_entropy is not None and stats.tail_mass is not None
    logits = exact.teacher_hidden.double() @ exact.teacher_weight[: exact.valid].double().t() / TEMPERATURE
    case.values("topk logits", logits.gather(1, merged.topk_ids.cpu()), logits.topk(TOPK, dim=1).values)
    entropy, tail = dense_topk_entropy(
        exact.teacher_hidden, exact.teacher_weight, TOPK, valid=exact.valid, temperature=TEMPERATURE
    )
    case.values("topk entropy", stats.topk_entropy, entropy)
    case.values("topk tail mass", stats.tail_mass, tail)


def top_k_losses(case: Case) -> None:
    """Autograd nodes on the list that the backend found itself."""
    problem, exact = case.problem, case.exact
    merged = merged_entropy(problem, 1, topk=TOPK, options=case.options)
    target = TopKTarget.of(finalize_entropy(merged, problem.valid), "teacher", None)
    ids = target.ids.cpu()
    for rule in TOPK_RULES:
        hidden, weight = _leaves(problem)
        output = topk_loss(
            hidden,
            weight,
            target,
            problem.labels,
            coefficients_of(rule, problem),
            rule=rule,
            shard=problem.shard(),
            tp_group=None,
            options=case.options,
        )
        output.loss.backward()
        wanted = _double_leaves(exact)
        loss, _ = dense_topk_loss(
            *wanted, *exact.inputs()[2:], coefficients_of(rule, exact), ids, rule, valid=exact.valid
        )
        loss.backward()
        _compare_node(case, f"topk {rule}", (output.loss, hidden, weight), (loss, *wanted))


def pointwise(case: Case) -> None:
    """JSD, skew KLs, clipped entries: autograd nodes."""
    problem, exact = case.problem, case.exact
    for rule in POINTWISE_RULES:
        hidden, weight = _leaves(problem)
        output = run_pointwise(problem, hidden, weight, rule, options=case.options)
        output.loss.backward()
        wanted = _double_leaves(exact)
        rows = dense_pointwise(*wanted, exact.teacher_hidden, exact.teacher_weight, rule, valid=exact.valid)
        loss = (exact.coefficients[:, 0].double() * rows).sum()
        loss.backward()
        _compare_node(case, f"pointwise {rule.kind}", (output.loss, hidden, weight), (loss, *wanted))


CHECKS: tuple[Callable[[Case], None], ...] = (statistics, gradients, top_k, top_k_losses, pointwise)


def _leaves(problem: Problem) -> tuple[Tensor, Parameter]:
    hidden = problem.student_hidden.clone().requires_grad_()
    return hidden, Parameter(problem.student_weight.clone())


def _double_leaves(exact: Problem) -> tuple[Tensor, Tensor]:
    return exact.student_hidden.double().requires_grad_(), exact.student_weight.double().requires_grad_()


def _compare_node(
    case: Case, name: str, ours: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Loss (relative to the sum of its terms' size, as it may cancel) and both gradients."""
    size = float(case.exact.coefficients.abs().sum())
    case.values(f"{name} loss", ours[0] / size, wanted[0] / size)
    for what, actual, expected in zip(("dh", "dW"), ours[1:], wanted[1:], strict=True):
        assert actual.grad is not None and expected.grad is not None
        case.gradient(f"{name} {what}", actual.grad, expected.grad, ROUNDED_NODE)
