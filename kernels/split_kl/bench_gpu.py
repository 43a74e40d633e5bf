"""The GPU benchmark: every backend and tile size against the roofline of the machine it runs on.

    python -m sead_kernels.split_kl.bench_gpu [--tp 8] [--output FILE.json]

NOT YET RUN ON A GPU. ``--device cpu`` runs the same code on the CPU with a small problem, as the tests do.

The default shape is a step of the primary target: 16384 tokens, half of them active, student width 4096, teacher
width 8192, vocabulary 128256 over 8 tensor-parallel ranks (one rank's share is measured, without communication).
The roofline is measured in the same run: the rate of one large GEMM and the bandwidth of one large copy.
Printed per backend and tile: milliseconds, achieved TFLOP/s and GB/s (scratch traffic included), and the share of
the roofline; then the fastest setting as lines for a config file.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import BACKENDS, TileOptions, VocabShard, finalize, linear_entropy, linear_split_kl_grads, linear_stats

TOKEN_TILES, VOCAB_TILES = (1024, 2048, 4096, 8192), (2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Problem:
    """Sizes of one rank: ``rows`` vocabulary rows of both output layers."""

    tokens: int
    active: int
    student_width: int
    teacher_width: int
    rows: int
    dtype: str = "bfloat16"

    def flops(self) -> dict[str, float]:
        """GEMM FLOPs of each pass, recomputed logits included."""
        both = self.student_width + self.teacher_width
        return {
            "statistics": 2.0 * self.tokens * self.rows * both,
            "gradients": 2.0 * self.active * self.rows * (both + 2 * self.student_width),
            "teacher top-k": 2.0 * self.tokens * self.rows * self.teacher_width,
        }

    def bytes(self, backend: str) -> dict[str, float]:
        """Compulsory traffic (weights and hidden states once, dW and dh) and what scratch tiles add.

        Not counted: dh, read and written again per vocabulary window, and the further sweeps of ``torch``.
        """
        item, both = getattr(torch, self.dtype).itemsize, self.student_width + self.teacher_width
        weights, hidden = self.rows * both * item, self.tokens * both * item
        logits = self.tokens * self.rows
        scratch = 0 if backend == "triton" else 4
        active = self.active * self.rows
        gradients = self.rows * self.student_width * item + self.active * self.student_width * 4
        return {
            # Two float32 tiles written and read.
            "statistics": weights + hidden + 4 * scratch * logits,
            # The same, and dz written once and read by two GEMMs.
            "gradients": weights
            + hidden * self.active / self.tokens
            + gradients
            + (4 * scratch + 3 * item) * active,
            "teacher top-k": (weights + hidden) * self.teacher_width / both + 2 * scratch * logits,
        }


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def machine_limits(
    device: torch.device, dtype: torch.dtype, repeats: int, *, large: bool
) -> tuple[float, float]:
    """(FLOP/s of a GEMM with float32 accumulation, bytes/s of a copy, read and written). `large`: as a GPU wants it."""
    size = 8192 if large else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / seconds_of(lambda: torch.mm(left, right), device, repeats)
    source = torch.empty(2**28 if large else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return flops, 2 * source.numel() * 4 / seconds_of(lambda: target.copy_(source), device, repeats)


def passes(
    problem: Problem, device: torch.device, options: TileOptions, topk: int
) -> dict[str, Callable[[], Any]]:
    """Each pass as a call on its own random inputs."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(getattr(torch, problem.dtype))

    models = [
        normal(problem.tokens, problem.student_width),
        normal(problem.rows, problem.student_width).mul_(0.05),
        normal(problem.tokens, problem.teacher_width),
        normal(problem.rows, problem.teacher_width).mul_(0.05),
    ]
    labels = torch.randint(0, problem.rows, (problem.tokens,), generator=generator, device=device)
    shard, some = VocabShard(0, problem.rows), slice(0, problem.active)
    active = [models[0][some], models[1], models[2][some], models[3], labels[some]]
    stats = finalize(linear_stats(*active, shard=shard, options=options))
    coefficients = torch.zeros(problem.active, 4, device=device)
    coefficients[::2, 0], coefficients[1::2, 1] = 1.0, 1.0
    main_grad = torch.zeros(models[1].shape, dtype=torch.float32, device=device)
    return {
        "statistics": lambda: linear_stats(*models, labels, shard=shard, options=options),
        "gradients": lambda: linear_split_kl_grads(
            *active, stats, coefficients, shard=shard, options=options, weight_grad=main_grad
        ),
        "teacher top-k": lambda: linear_entropy(
            models[2], models[3], labels, shard=shard, topk=topk, options=options
        ),
    }


def measure(
    problem: Problem,
    device: torch.device,
    settings: list[TileOptions],
    topk: int,
    repeats: int,
    limits: tuple[float, float],
) -> list[dict[str, Any]]:
    """One record per setting and pass. `limits`: what `machine_limits` found."""
    flop_rate, byte_rate = limits
    records = []
    for options in settings:
        traffic = problem.bytes(options.backend)
        for name, run in passes(problem, device, options, topk).items():
            seconds, flops = seconds_of(run, device, repeats), problem.flops()[name]
            bound = max(flops / flop_rate, traffic[name] / byte_rate)
            records.append(
                {
                    "backend": options.backend,
                    "tile_tokens": options.tokens,
                    "tile_vocab": options.vocab,
                    "pass": name,
                    "milliseconds": seconds * 1e3,
                    "tflops": flops / seconds / 1e12,
                    "gigabytes_per_second": traffic[name] / seconds / 1e9,
                    "of_roofline": bound / seconds,
                }
            )
    return records


def fastest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the least time for statistics and gradients together."""
    totals: dict[tuple[str, int, int], float] = {}
    for record in records:
        if record["pass"] != "teacher top-k":
            key = record["backend"], record["tile_tokens"], record["tile_vocab"]
            totals[key] = totals.get(key, 0.0) + record["milliseconds"]
    backend, tokens, vocab = min(totals, key=lambda key: totals[key])
    return {"backend": backend, "tile_tokens": tokens, "tile_vocab": vocab}


def report(records: list[dict[str, Any]], console: Console) -> None:
    table = Table("backend", "tile", "pass", "ms", "TFLOP/s", "GB/s", "of roofline")
    for r in records:
        numbers = [
            f"{r[key]:.3g}" for key in ("milliseconds", "tflops", "gigabytes_per_second", "of_roofline")
        ]
        table.add_row(r["backend"], f"{r['tile_tokens']} x {r['tile_vocab']}", r["pass"], *numbers)
    console.print(table)
    best = fastest(records)
    console.print("fastest:\nkernel:\n" + "\n".join(f"  {key}: {value}" for key, value in best.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for name, value in (
        ("tokens", 16384),
        ("active", 8192),
        ("student-width", 4096),
        ("teacher-width", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=128256, help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=8, help="tensor-parallel size; default: %(default)s")
    parser.add_argument("--topk", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--token-tiles", type=int, nargs="+", default=TOKEN_TILES, help="default: %(default)s"
    )
    parser.add_argument(
        "--vocab-tiles", type=int, nargs="+", default=VOCAB_TILES, help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --device cpu runs a small problem on the CPU")
    problem = Problem(
        arguments.tokens,
        arguments.active,
        arguments.student_width,
        arguments.teacher_width,
        arguments.vocabulary // arguments.tp,
        "bfloat16" if device.type == "cuda" else "float32",
    )
    usable = [
        name for name, backend in BACKENDS.items() if backend.unavailable(device, torch.float32) is None
    ]
    settings = [
        TileOptions(backend, tokens, vocab)
        for backend, tokens, vocab in itertools.product(usable, arguments.token_tiles, arguments.vocab_tiles)
    ]
    dtype = getattr(torch, problem.dtype)
    limits = machine_limits(device, dtype, arguments.repeats, large=device.type == "cuda")
    records = measure(problem, device, settings, arguments.topk, arguments.repeats, limits)
    report(records, Console())
    if arguments.output:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        result = {"date": datetime.date.today().isoformat(), "device": name, "problem": asdict(problem)}
        result |= {"torch": torch.__version__, "records": records, "fastest": fastest(records)}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
