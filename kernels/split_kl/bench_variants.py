"""What ``bench.py`` measures: one problem, computed by our backends and by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import (
    PointwiseRule,
    TileOptions,
    TokenStats,
    VocabShard,
    finalize,
    linear_split_kl_grads,
    linear_stats,
    pointwise_loss,
    split_kl_loss,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Both models have ``width`` hidden units; ``active`` of the ``tokens`` rows take part in the loss."""

    tokens: int
    width: int
    vocabulary: int
    active: int

    def gemm_flops(self, over_all: int, over_active: int) -> int:
        """Of so many GEMMs of all rows and of the active ones with a [vocabulary, width] matrix."""
        rows = over_all * self.tokens + over_active * self.active
        return 2 * rows * self.width * self.vocabulary


@dataclass(frozen=True)
class Inputs:
    """Leaves ``hidden`` and ``weight`` of the student, constants of the teacher, and which rows are active."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    active: Tensor

    @classmethod
    def make(cls, shape: Shape, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.empty(size, device=device).normal_(generator=generator).mul_(scale).to(dtype)

        stride = shape.tokens // shape.active
        return cls(
            hidden=normal(shape.tokens, shape.width).requires_grad_(),
            weight=normal(shape.vocabulary, shape.width, scale=0.1).requires_grad_(),
            teacher_hidden=normal(shape.tokens, shape.width),
            teacher_weight=normal(shape.vocabulary, shape.width, scale=0.1),
            labels=torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator, device=device),
            active=torch.arange(0, shape.tokens, stride, device=device)[: shape.active],
        )


def _naive_loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Reverse KL of each row, with both models' logits and their softmaxes in memory."""
    log_p = (hidden @ weight.t()).log_softmax(-1)
    log_q = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def naive(x: Inputs, options: TileOptions) -> float:
    """What our kernels compute, by autograd: any mix of the four terms per row; here the mix is one of them."""
    log_p = (x.hidden @ x.weight.t()).log_softmax(-1)
    log_q = (x.teacher_hidden @ x.teacher_weight.t()).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    terms = [
        (q * (log_q - log_p)).sum(-1),
        (p * (log_p - log_q)).sum(-1),
        -(p * log_p).sum(-1),
        log_p.gather(1, x.labels[:, None])[:, 0],
    ]
    loss = (_coefficients(x) * torch.stack(terms, dim=1)).sum()
    loss.backward()
    return loss.item()


def naive_reverse_kl(x: Inputs, options: TileOptions) -> float:
    """The loss alone, of all rows."""
    rows = _naive_loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
    loss = rows[x.active].sum()
    loss.backward()
    return loss.item()


def naive_active(x: Inputs, options: TileOptions) -> float:
    hidden, teacher_hidden = x.hidden[x.active], x.teacher_hidden[x.active]
    loss = _naive_loss(hidden, x.weight, teacher_hidden, x.teacher_weight).sum()
    loss.backward()
    return loss.item()


def liger(x: Inputs, options: TileOptions) -> float:
    """Its chunked fused-linear JSD at the end that is the reverse KL; rows selected by us."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    loss = criterion(
        x.hidden[x.active], x.weight, x.teacher_hidden[x.active], x.teacher_weight, x.labels[x.active]
    )
    # It divides by the number of labels.
    loss = loss * x.active.numel()
    loss.backward()
    return loss.item()


def trl(x: Inputs, options: TileOptions) -> float:
    """The tiled divergence of its DistillationTrainer; that trainer selects the rows too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, teacher_hidden = x.hidden[x.active], x.teacher_hidden[x.active]
    rows, _ = ChunkedDivergenceFunction.apply(
        hidden, x.weight, None, teacher_hidden, x.teacher_weight, None, 1.0
    )
    loss = rows.sum()
    loss.backward()
    return loss.item()


def _coefficients(x: Inputs) -> Tensor:
    coefficients = torch.zeros(x.labels.shape[0], 4, device=x.labels.device)
    coefficients[x.active, 1] = 1.0
    return coefficients


def fused(x: Inputs, options: TileOptions) -> float:
    """``split_kl_loss``: statistics and gradients of the active rows."""
    loss = split_kl_loss(
        x.hidden,
        x.weight,
        x.teacher_hidden,
        x.teacher_weight,
        x.labels,
        _coefficients(x),
        shard=VocabShard(0, x.weight.shape[0]),
        tp_group=None,
        options=options,
    ).loss
    loss.backward()
    return loss.item()


def scored(x: Inputs, options: TileOptions) -> float:
    """Statistics of ALL rows, as a choice of zones needs them, then gradients of the active ones."""
    shard = VocabShard(0, x.weight.shape[0])
    hidden, weight = x.hidden.detach(), x.weight.detach()
    state = linear_stats(
        hidden, weight, x.teacher_hidden, x.teacher_weight, x.labels, shard=shard, options=options
    )
    stats = TokenStats(*(value[x.active] for value in finalize(state)))
    dh, x.weight.grad = linear_split_kl_grads(
        hidden[x.active],
        weight,
        x.teacher_hidden[x.active],
        x.teacher_weight,
        x.labels[x.active],
        stats,
        _coefficients(x)[x.active],
        shard=shard,
        options=options,
    )
    x.hidden.grad = torch.zeros_like(hidden).index_copy_(0, x.active, dh)
    return stats.reverse_kl.sum().item()


@dataclass(frozen=True)
class Variant:
    """``gemms``: (over all rows, over the active ones) that it needs, recomputed logits included."""

    run: Callable[[Inputs, TileOptions], float]
    gemms: tuple[int, int]
    backend: str = "torch"
    cache: bool = False


VARIANTS = {
    "naive": Variant(naive, (4, 0)),
    "naive, loss alone": Variant(naive_reverse_kl, (4, 0)),
    "naive, loss alone, active rows": Variant(naive_active, (0, 4)),
    "Liger JSD": Variant(liger, (0, 4)),
    "TRL divergence": Variant(trl, (0, 6)),
    "split_kl torch": Variant(fused, (0, 6), "torch"),
    "split_kl cpu": Variant(fused, (0, 6), "cpu"),
    "split_kl cpu, logits kept": Variant(fused, (0, 4), "cpu", cache=True),
    "split_kl torch, all rows scored": Variant(scored, (2, 4), "torch"),
    "split_kl cpu, all rows scored": Variant(scored, (2, 4), "cpu"),
}


def _naive_divergence(log_p: Tensor, log_q: Tensor, rule: PointwiseRule) -> Tensor:
    """Of each row, from the definitions in ``pointwise.py``."""
    p, q, share = log_p.exp(), log_q.exp(), rule.share or 0.0
    if rule.kind == "jsd":
        log_m = (share * q + (1 - share) * p).log()
        entries = share * q * (log_q - log_m) + (1 - share) * p * (log_p - log_m)
    elif rule.kind == "skew_reverse":
        entries = p * (log_p - (share * p + (1 - share) * q).log())
    else:
        entries = q * (log_q - log_p)
    return (entries if rule.clip is None else entries.clamp(max=rule.clip)).sum(-1)


def _naive_pointwise(rule: PointwiseRule) -> Callable[[Inputs, TileOptions], float]:
    def run(x: Inputs, options: TileOptions) -> float:
        log_p = (x.hidden[x.active] @ x.weight.t()).log_softmax(-1)
        log_q = (x.teacher_hidden[x.active] @ x.teacher_weight.t()).log_softmax(-1)
        loss = _naive_divergence(log_p, log_q, rule).sum()
        loss.backward()
        return loss.item()

    return run


def _fused_pointwise(rule: PointwiseRule) -> Callable[[Inputs, TileOptions], float]:
    def run(x: Inputs, options: TileOptions) -> float:
        loss = pointwise_loss(
            x.hidden,
            x.weight,
            x.teacher_hidden,
            x.teacher_weight,
            x.labels,
            _coefficients(x)[:, 1],
            rule,
            shard=VocabShard(0, x.weight.shape[0]),
            tp_group=None,
            options=options,
        ).loss
        loss.backward()
        return loss.item()

    return run


def _pointwise_variants(rule: PointwiseRule) -> dict[str, Variant]:
    # Both models' logits in pass 1, in the sweep and in pass 2, then the two gradients.
    return {
        f"naive, active rows, {rule.kind}": Variant(_naive_pointwise(rule), (0, 4)),
        f"split_kl torch, {rule.kind}": Variant(_fused_pointwise(rule), (0, 8), "torch"),
        f"split_kl cpu, {rule.kind}": Variant(_fused_pointwise(rule), (0, 8), "cpu"),
        f"split_kl cpu, logits kept, {rule.kind}": Variant(_fused_pointwise(rule), (0, 4), "cpu", cache=True),
    }


# GKD's, DistiLLM's and OPSD's divergences: what is compared with each other is the same loss.
POINTWISE = {
    rule.kind: _pointwise_variants(rule)
    for rule in (
        PointwiseRule("jsd", 0.5),
        PointwiseRule("skew_reverse", 0.1),
        PointwiseRule("forward", clip=0.05),
    )
}
ALL = VARIANTS | {name: variant for variants in POINTWISE.values() for name, variant in variants.items()}
