"""Naive autograd loss against the ``torch`` backend on one CPU thread: CPU seconds and peak extra memory.

    python -m sead_kernels.split_kl.bench [--output FILE.json]

Every variant runs in a fresh process, so that its peak memory is its own. Time is CPU time, best of three:
wall time on a shared machine measures the neighbours. Inputs, coefficients and results are the same for all
variants:

    naive            logits of both models for all rows, log_softmax, torch autograd
    naive_active     the same after dropping inactive rows
    split_kl_loss    ``split_kl_loss``: pass 1 and pass 2 on the active rows
    scored_grads     statistics of all rows (what zone selection needs), then gradients of the active ones
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import (
    TileOptions,
    TokenStats,
    VocabShard,
    finalize,
    linear_split_kl_grads,
    linear_stats,
    split_kl_loss,
)

TOKENS, WIDTH, VOCABULARY, REPEATS = 1024, 512, 49152, 3
PEAK_TARGET, TIME_TARGET = 0.12, 0.7
# GEMMs of 2 * rows * WIDTH * VOCABULARY operations, (over all rows, over the active ones): logits of both
# models, dh and dW; tiles compute the logits a second time in pass 2.
GEMMS = {"naive": (4, 0), "naive_active": (0, 4), "split_kl_loss": (0, 6), "scored_grads": (2, 4)}


@dataclass(frozen=True)
class Inputs:
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    coefficients: Tensor

    def active(self) -> Tensor:
        return self.coefficients.any(1).nonzero()[:, 0]


def make_inputs() -> Inputs:
    """Random models; half of the rows active, alternately reverse KL with an entropy bonus and forward KL."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape).normal_(generator=generator)

    coefficients = torch.zeros(TOKENS, 4)
    coefficients[0::4, 1], coefficients[0::4, 2] = 1.0, -0.1
    coefficients[1::4, 0] = 1.0
    return Inputs(
        student_hidden=normal(TOKENS, WIDTH).requires_grad_(),
        student_weight=normal(VOCABULARY, WIDTH).mul_(0.1).requires_grad_(),
        teacher_hidden=normal(TOKENS, WIDTH),
        teacher_weight=normal(VOCABULARY, WIDTH).mul_(0.1),
        labels=torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
        coefficients=coefficients,
    )


def naive(x: Inputs, rows: Tensor | slice) -> float:
    log_p = (x.student_hidden[rows] @ x.student_weight.t()).log_softmax(-1)
    log_q = (x.teacher_hidden[rows] @ x.teacher_weight.t()).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    terms = [
        (q * (log_q - log_p)).sum(-1),
        (p * (log_p - log_q)).sum(-1),
        -(p * log_p).sum(-1),
        log_p.gather(1, x.labels[rows, None])[:, 0],
    ]
    loss = (x.coefficients[rows] * torch.stack(terms, dim=1)).sum()
    loss.backward()
    return loss.item()


def fused(x: Inputs, options: TileOptions) -> float:
    loss = split_kl_loss(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        x.labels,
        x.coefficients,
        shard=VocabShard(0, VOCABULARY),
        tp_group=None,
        options=options,
    ).loss
    loss.backward()
    return loss.item()


def scored(x: Inputs, options: TileOptions) -> float:
    shard = VocabShard(0, VOCABULARY)
    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    state = linear_stats(
        hidden, weight, x.teacher_hidden, x.teacher_weight, x.labels, shard=shard, options=options
    )
    active = x.active()
    stats, coefficients = TokenStats(*(value[active] for value in finalize(state))), x.coefficients[active]
    dh, x.student_weight.grad = linear_split_kl_grads(
        hidden[active],
        weight,
        x.teacher_hidden[active],
        x.teacher_weight,
        x.labels[active],
        stats,
        coefficients,
        shard=shard,
        options=options,
    )
    x.student_hidden.grad = torch.zeros_like(hidden).index_copy_(0, active, dh)
    terms = [stats.forward_kl, stats.reverse_kl, stats.student_entropy, stats.student_logprob]
    return (coefficients * torch.stack(terms, dim=1)).sum().item()


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def measure(variant: str, options: TileOptions) -> dict[str, float]:
    """Run one variant in this process."""
    torch.set_num_threads(1)
    x = make_inputs()
    runs: dict[str, Callable[[], float]] = {
        "naive": lambda: naive(x, slice(None)),
        "naive_active": lambda: naive(x, x.active()),
        "split_kl_loss": lambda: fused(x, options),
        "scored_grads": lambda: scored(x, options),
    }
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the BLAS allocates its own buffers once
    baseline, seconds, loss = memory_mib("VmRSS"), [], 0.0
    for _ in range(REPEATS):
        x.student_hidden.grad = x.student_weight.grad = None
        start = time.process_time()
        loss = runs[variant]()
        seconds.append(time.process_time() - start)
    assert x.student_hidden.grad is not None and x.student_weight.grad is not None
    every, active = GEMMS[variant]
    flops = 2 * WIDTH * VOCABULARY * (every * TOKENS + active * x.active().numel())
    return {
        "cpu_seconds": min(seconds),
        "peak_extra_mib": memory_mib("VmHWM") - baseline,
        "gemm_flops": flops,
        "loss": loss,
        "hidden_grad_norm": x.student_hidden.grad.norm().item(),
        "weight_grad_norm": x.student_weight.grad.norm().item(),
    }


def sgemm_gflops(options: TileOptions) -> float:
    """Best rate of the tile's GEMM, by CPU time of one thread."""
    torch.set_num_threads(1)
    hidden, weight = torch.randn(options.tokens, WIDTH), torch.randn(options.vocab, WIDTH)
    out, best = torch.empty(options.tokens, options.vocab), float("inf")
    for _ in range(10):
        start = time.process_time()
        torch.mm(hidden, weight.t(), out=out)
        best = min(best, time.process_time() - start)
    return 2 * out.numel() * WIDTH / best / 1e9


def machine() -> dict[str, str | int | None]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.machine(),
    }


def git_commit() -> str | None:
    """The checkout's commit, None outside of git or before the first one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def report(result: dict[str, Any], console: Console) -> None:
    naive_row = result["variants"]["naive"]
    table = Table(title=f"T={TOKENS} H={WIDTH} V={VOCABULARY}, half active, float32, 1 thread")
    for column in ("variant", "CPU s", "of naive", "limit s", "GFLOP/s", "peak MiB", "of naive"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in result["variants"].items():
        table.add_row(
            name,
            f"{row['cpu_seconds']:.2f}",
            f"{row['cpu_seconds'] / naive_row['cpu_seconds']:.2f}",
            f"{row['gemm_flops'] / result['sgemm_gflops'] / 1e9:.2f}",
            f"{row['gemm_flops'] / row['cpu_seconds'] / 1e9:.0f}",
            f"{row['peak_extra_mib']:.0f}",
            f"{row['peak_extra_mib'] / naive_row['peak_extra_mib']:.3f}",
        )
    console.print(table)
    console.print(
        f"sgemm {result['sgemm_gflops']:.0f} GFLOP/s is the limit; weight gradient alone "
        f"{VOCABULARY * WIDTH * 4 / 2**20:.0f} MiB; targets: time {TIME_TARGET}, peak {PEAK_TARGET} of naive"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--tile-tokens", type=int, default=TileOptions().tokens)
    parser.add_argument("--tile-vocab", type=int, default=TileOptions().vocab)
    parser.add_argument("--variant", choices=GEMMS, help="measure one variant in this process and print JSON")
    arguments = parser.parse_args()
    options = TileOptions(backend="torch", tokens=arguments.tile_tokens, vocab=arguments.tile_vocab)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, options)))
        return
    tiles = [f"--tile-tokens={options.tokens}", f"--tile-vocab={options.vocab}"]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "git_commit": git_commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "threads": 1,
        "shape": {"tokens": TOKENS, "width": WIDTH, "vocabulary": VOCABULARY, "active": TOKENS // 2},
        "options": asdict(options),
        "sgemm_gflops": sgemm_gflops(options),
        "variants": {},
    }
    for variant in GEMMS:
        command = [sys.executable, "-m", __spec__.name, f"--variant={variant}", *tiles]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result["variants"][variant] = json.loads(done.stdout)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    report(result, Console())


if __name__ == "__main__":
    main()
