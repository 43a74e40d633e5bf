"""Runs every kernel of a CUDA source on the host against the dense float64 oracle.

    python -m sead_kernels.split_kl.cuda.emulated_check [FILE.cu]

Exit code 0 if all agree. The tests run it on ``tiles.cu`` and on copies with a seeded fault, in a process of its
own, since a faulty kernel may abort or corrupt memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..pointwise import SUMS, PointwiseRule, pack_pointwise_scalars
from ..reference import dense_gradients, dense_stats, dense_topk_entropy, pointwise_entries
from ..row_scalars import pack_scalars
from ..state import SENTINEL, TokenStats, finalize
from ..topk import NO_ID
from .build import SOURCE
from .tiles import CudaTiles

ROWS, VOCABULARY, SCALE, TOPK = 14, 1200, 0.8, 64
# Ragged on purpose; the first is wider than the top-k kernel's buffer, the second narrower than a block.
WINDOWS = [(0, 1003), (1003, 1040), (1040, 1200)]
CANARY = 12345.0
RULES = [
    PointwiseRule("jsd", 0.3),
    PointwiseRule("skew_forward", 0.2, clip=0.01),
    PointwiseRule("skew_reverse", 0.2, clip=0.01),
    PointwiseRule("forward"),
    PointwiseRule("reverse", clip=0.01),
]


class Case:
    """Logits of two models over 1200 tokens; identity weights make the oracle take them as they are."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.z = torch.randn(ROWS, VOCABULARY, generator=generator) * 3
        self.w = torch.randn(ROWS, VOCABULARY, generator=generator) * 2 - 4
        # Top-k: every candidate beats the list, none does, ties, zeros of both signs, negative logits only.
        self.z[1], self.z[2] = self.z[1].sort().values, self.z[2].sort(descending=True).values
        self.z[3] = torch.randint(-2, 3, (VOCABULARY,), generator=generator).float()
        self.z[4] = -torch.randint(0, 2, (VOCABULARY,), generator=generator).float()
        self.z[4, ::3] += 0.0  # -0 becomes +0
        self.z[5] = -self.z[5].abs() - 1
        # Peaks that a wrong maximum turns into an overflow or underflow: one per warp, in its upper half.
        for warp in range(8):
            self.z[6 + warp, 128 * warp + 70] = 150.0
            self.w[6 + warp, 128 * (7 - warp) + 90] = 600.0
        self.z[0, 1100] = self.w[1, 1010] = 150.0  # the maximum moves late, by much
        # Every position within a vector, both ends of every window.
        self.labels = torch.tensor([0, 1, 2, 3, 1002, 1003, 1039, 1040, 1199, 513, 514, 70, 218, 1001])
        self.coefficients = torch.randn(ROWS, 4, generator=generator)
        self.identity = torch.eye(VOCABULARY, dtype=torch.float64)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.z, self.identity, self.w, self.identity, self.labels

    def stats(self) -> TokenStats:
        return dense_stats(*self.inputs(), valid=VOCABULARY, temperature=1 / SCALE)

    def windows(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(columns, tile of z, tile of w, the labels' columns); what lies between the rows is NaN."""
        for start, stop in WINDOWS:
            stride = ((stop - start) // 16 + 1) * 16
            tiles = []
            for logits in (self.z, self.w):
                padded = torch.full((ROWS, stride), float("nan"))
                padded[:, : stop - start] = logits[:, start:stop]
                tiles.append(padded[:, : stop - start])
            yield slice(start, stop), tiles[0], tiles[1], self.labels - start


class Problems(list[str]):
    """What did not agree."""

    def near(
        self, what: str, actual: Tensor, expected: Tensor, absolute: float | Tensor, relative: float = 0.0
    ) -> None:
        allowed = absolute + relative * expected.double().abs()
        # Written so that NaN counts as a difference.
        if not bool(((actual.double() - expected.double()).abs() <= allowed).all()):
            self.append(what)

    def same(self, what: str, actual: Tensor, expected: Tensor) -> None:
        if not torch.equal(actual, expected):
            self.append(what)


def guarded(rows: int) -> Tensor:
    """[rows, ROWS + 4]: the kernel gets the columns between the two canaries on each side."""
    return torch.full((rows, ROWS + 4), CANARY)


def check_statistics(kernels: CudaTiles, case: Case, problems: Problems) -> None:
    both, one = guarded(10), guarded(4)
    both[:, 2:-2], one[:, 2:-2] = 0, 0
    both[[0, 4], 2:-2], one[0, 2:-2] = SENTINEL, SENTINEL
    for _, z, w, columns in case.windows():
        kernels.stats(z, w, [], columns, SCALE, both[:, 2:-2])
        kernels.entropy(z, [], columns, SCALE, one[:, 2:-2])
    expected = case.stats()
    for name, value in finalize(both[:, 2:-2])._asdict().items():
        problems.near(f"stats: {name}", value, getattr(expected, name), 2e-5, 1e-6)
    for rows, name in ((both, "stats"), (one, "entropy")):
        problems.same(f"{name}: wrote outside", rows[:, [0, 1, -2, -1]], guarded(len(rows))[:, :4])
    m, s, u, z_y = one[:, 2:-2].unbind(0)
    problems.near("entropy: lse", m + s.log(), expected.student_lse, 1e-5)
    problems.near("entropy: entropy", s.log() - u / s, expected.student_entropy, 1e-5)
    problems.near("entropy: logprob", z_y - m - s.log(), expected.student_logprob, 2e-5)


def check_topk(kernels: CudaTiles, case: Case, problems: Problems) -> None:
    for topk in (1, TOPK, 128):
        logits, ids = torch.full((ROWS, topk), SENTINEL), torch.full((ROWS, topk), NO_ID)
        for columns, z, _, _ in case.windows():
            kernels.topk(z, [], columns.start, SCALE, logits, ids)
        values, order = (case.z * SCALE).sort(dim=1, descending=True, stable=True)
        problems.same(f"topk {topk}: ids", ids, order[:, :topk])
        problems.near(f"topk {topk}: logits", logits, values[:, :topk], 0.0)
    exact = dense_topk_entropy(case.z, case.identity, 128, valid=VOCABULARY, temperature=1 / SCALE)[1]
    tail = 1 - (logits.double() - case.stats().student_lse[:, None]).exp().sum(1)
    problems.near("topk: tail mass", tail, exact, 1e-5)


def check_gradients(kernels: CudaTiles, case: Case, problems: Problems) -> None:
    stats = TokenStats(*(value.float() for value in case.stats()))
    scalars = pack_scalars(stats, case.coefficients, 1 / SCALE, torch.float32)
    expected, _ = dense_gradients(*case.inputs(), case.coefficients, valid=VOCABULARY, temperature=1 / SCALE)
    support = torch.stack([scalars[0], torch.ones(ROWS), torch.full((ROWS,), -0.3)])
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(r))[:300] for r in range(ROWS)]
    )
    values = torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(9))
    log_p = case.z.double() * SCALE - case.stats().student_lse[:, None]
    sparse = (log_p.exp() * (1 - 0.3 * log_p)).scatter(1, ids, values.double())
    # Logarithms of the size of the largest logit are rounded to 1e-7 of it.
    absolute = 2e-7 * (10 + torch.maximum(case.z.abs(), case.w.abs()).amax(1, keepdim=True).double())
    for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8 + 1e-5)):
        for window, z, w, columns in case.windows():
            for name, wanted in (("gradient", expected[:, window]), ("support", sparse[:, window])):
                whole = torch.full((ROWS + 2, z.stride(0)), CANARY, dtype=dtype)
                dz = whole[1:-1, : z.shape[1]]
                if name == "gradient":
                    kernels.gradient(z, w, [], columns, SCALE, scalars, dz)
                else:
                    kernels.support_gradient(z, [], SCALE, support, ids - window.start, values, dz)
                problems.near(f"{name}, {dtype}", dz, wanted, absolute, relative)
                canary = torch.full_like(whole[[0, -1]], CANARY)
                problems.same(f"{name}, {dtype}: wrote outside", whole[[0, -1]], canary)
    for window, z, w, columns in case.windows():  # in place
        kernels.gradient(z, w, [], columns, SCALE, scalars, z)
        problems.near("gradient in place", z, expected[:, window], absolute, 1e-5)


def check_pointwise(kernels: CudaTiles, case: Case, problems: Problems) -> None:
    stats = TokenStats(*(value.float() for value in case.stats()))
    lse = torch.stack([stats.student_lse, stats.teacher_lse])
    log_p = case.z.double() * SCALE - case.stats().student_lse[:, None]
    log_q = case.w.double() * SCALE - case.stats().teacher_lse[:, None]
    p = log_p.exp()
    # A rounded log-sum-exp; of the divergences times the sum of their slopes.
    absolute = 2e-7 * (10 + torch.maximum(case.z.abs(), case.w.abs()).amax(1, keepdim=True).double())
    for rule in RULES:
        leaf = log_p.clone().requires_grad_()
        entries = pointwise_entries(leaf, log_q, rule)
        (moment,) = torch.autograd.grad(entries.sum(), leaf)
        parts = (entries.detach(), moment, p, (p - log_q.exp()).abs())
        sums = guarded(len(SUMS))
        sums[:, 2:-2] = 0
        for _, z, w, _ in case.windows():
            kernels.pointwise_stats(z, w, [], SCALE, lse, rule.numbers(), sums[:, 2:-2])
        problems.same("pointwise: wrote outside", sums[:, [0, 1, -2, -1]], guarded(len(SUMS))[:, :4])
        for name, row, part in zip(SUMS, sums[:, 2:-2], parts, strict=True):
            problems.near(f"pointwise {rule.kind}: {name}", row, part.sum(1), 3 * absolute[:, 0], 1e-6)
        mean = moment.sum(1)
        expected = case.coefficients[:, :1].double() * SCALE * (moment - p * mean[:, None])
        scalars = pack_pointwise_scalars(
            stats, mean.float(), case.coefficients[:, 0], 1 / SCALE, torch.float32
        )
        # The error of p g and of p M, each of the size of the largest logarithm times p.
        allowed = absolute * (1 + p * (1 + mean.abs()[:, None] + (log_p - log_q).abs()))
        for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8 + 1e-5)):
            for window, z, w, _ in case.windows():
                whole = torch.full((ROWS + 2, z.stride(0)), CANARY, dtype=dtype)
                dz = whole[1:-1, : z.shape[1]]
                kernels.pointwise_gradient(z, w, [], SCALE, scalars, rule.numbers(), dz)
                name = f"pointwise {rule.kind}: gradient, {dtype}"
                problems.near(name, dz, expected[:, window], allowed[:, window], relative)
                canary = torch.full_like(whole[[0, -1]], CANARY)
                problems.same(f"{name}: wrote outside", whole[[0, -1]], canary)
        for window, z, w, _ in case.windows():  # in place
            kernels.pointwise_gradient(z, w, [], SCALE, scalars, rule.numbers(), z)
            problems.near("pointwise in place", z, expected[:, window], allowed[:, window], 1e-5)


def check(source: Path) -> list[str]:
    """What the kernels of ``source`` get wrong, several times over: threads run in another order each time."""
    torch.set_num_threads(1)
    kernels, problems = CudaTiles(emulated=True, source=source), Problems()
    reason = kernels.unavailable(torch.device("cpu"), torch.float32)
    if reason is not None:
        raise RuntimeError(reason)
    for _ in range(2):
        for part in (check_statistics, check_topk, check_gradients, check_pointwise):
            part(kernels, Case(), problems)
    return problems


if __name__ == "__main__":
    found = check(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
    print("\n".join(sorted(set(found))) or "all kernels agree")
    sys.exit(bool(found))
