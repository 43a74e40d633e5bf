"""The CPU benchmark: our backends, naive autograd, Liger and TRL on one thread, CPU seconds and peak memory.

    python -m sead_kernels.split_kl.bench [--output FILE.json] [--quick]

Every variant of ``bench_variants.py`` runs in a fresh process, so that its peak memory is its own. Time is CPU
time, best of three after a first run (which compiles what a peer compiles): wall time on a shared machine
measures the neighbours. The limit is the GEMMs of a variant at the sgemm rate of the same process. The variants
compute the same loss, the reverse KL of the active rows, and must agree on it and on the gradients; so must those of
each pointwise divergence, which are measured at one shape.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import TileOptions
from .bench_variants import ALL, POINTWISE, VARIANTS, Inputs, Shape, Variant

TOKENS, WIDTH, REPEATS = 1024, 512, 3
VOCABULARIES = (49152, 128256)
SHARES = (0.25, 0.5, 1.0)
AGREEMENT = 1e-4  # relative: loss and both gradient norms, against the first variant
CACHE_MIB = 4096  # of "logits kept": everything


def growth_shapes() -> dict[str, list[tuple[int, Shape]]]:
    """One size varied at a time around (512 tokens, width 512, vocabulary 32768), all rows active."""
    return {
        "tokens": [(n, Shape(n, 512, 32768, n)) for n in (256, 512, 1024, 2048)],
        "vocabulary": [(n, Shape(512, 512, n, 512)) for n in (16384, 32768, 65536, 131072)],
        "width": [(n, Shape(512, n, 32768, 512)) for n in (256, 512, 1024, 2048)],
        "tensor-parallel size": [(n, Shape(512, 512, 131072 // n, 512)) for n in (1, 2, 4, 8)],
    }


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def sgemm_gflops(rows: int, columns: int, inner: int) -> float:
    """Best rate of a tile's GEMM, by CPU time of one thread."""
    left, right, out = torch.randn(rows, inner), torch.randn(columns, inner), torch.empty(rows, columns)
    best = float("inf")
    for _ in range(8):
        start = time.process_time()
        torch.mm(left, right.t(), out=out)
        best = min(best, time.process_time() - start)
    return 2 * rows * columns * inner / best / 1e9


def measure(name: str, shape: Shape) -> dict[str, float]:
    """Run one variant in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    variant, x = ALL[name], Inputs.make(shape)
    options = TileOptions(backend=variant.backend, cache_mib=CACHE_MIB if variant.cache else 0)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the BLAS allocates its own buffers once
    rate, seconds, loss = 0.0, [], 0.0
    variant.run(x, options)
    x.hidden.grad = x.weight.grad = None
    for _ in range(REPEATS):
        rate = max(rate, sgemm_gflops(min(shape.tokens, options.tokens), options.vocab, shape.width))
        x.hidden.grad = x.weight.grad = None
        start = time.process_time()
        loss = variant.run(x, options)
        seconds.append(time.process_time() - start)
    assert x.hidden.grad is not None and x.weight.grad is not None
    flops = shape.gemm_flops(*variant.gemms)
    return {
        "cpu_seconds": min(seconds),
        "gemm_flops": flops,
        "sgemm_gflops": rate,
        "of_limit": flops / 1e9 / rate / min(seconds),
        "loss": loss,
        "hidden_grad_norm": x.hidden.grad.norm().item(),
        "weight_grad_norm": x.weight.grad.norm().item(),
    }


def peak_mib(name: str, shape: Shape) -> float:
    """Peak of one run over what inputs and libraries take; a process of its own, nothing warmed up."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    variant, x = ALL[name], Inputs.make(shape)
    options = TileOptions(backend=variant.backend, cache_mib=CACHE_MIB if variant.cache else 0)
    # Load and compile what is loaded and compiled once, on a problem that leaves no mark.
    variant.run(Inputs.make(Shape(16, 16, 512, 16)), options)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    variant.run(x, options)
    return memory_mib("VmHWM") - before


def in_a_process(task: str, name: str, shape: Shape) -> Any:
    """What ``measure`` or ``peak_mib`` returns, or {"error": its last line}."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        f"--{task}={name}",
        f"--shape={json.dumps(asdict(shape))}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: Shape, console: Console, variants: dict[str, Variant] = VARIANTS) -> dict[str, Any]:
    """All variants of a loss at one shape."""
    rows: dict[str, Any] = {}
    for name in variants:
        row = in_a_process("measure", name, shape)
        if "error" not in row:
            row["peak_extra_mib"] = in_a_process("peak", name, shape)
            first = next(iter(rows.values()), row)
            for key in ("loss", "hidden_grad_norm", "weight_grad_norm"):
                if abs(row[key] / first[key] - 1) > AGREEMENT:
                    row["error"] = f"disagrees: {key} {row[key]}, wanted {first[key]}"
        rows[name] = row
        console.print(f"V={shape.vocabulary} active={shape.active} {name}: {row.get('error', 'done')}")
    return rows


def fitted_exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log seconds over log size."""
    sizes, seconds = (torch.tensor(column).double().log() for column in zip(*points, strict=True))
    sizes -= sizes.mean()
    return float((sizes * seconds).sum() / (sizes * sizes).sum())


def growth(console: Console) -> dict[str, Any]:
    """CPU seconds of ``split_kl cpu`` as one size grows, per rank where that is the tensor-parallel size."""
    result = {}
    for what, shapes in growth_shapes().items():
        points = [(n, in_a_process("measure", "split_kl cpu", shape)["cpu_seconds"]) for n, shape in shapes]
        result[what] = {"points": points, "exponent": fitted_exponent(points)}
        console.print(f"growth with {what}: exponent {result[what]['exponent']:.2f}")
    return result


def machine() -> dict[str, str | int | None]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.machine(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of this directory, None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit() -> str | None:
    return _git("rev-parse", "HEAD")


def uncommitted_changes() -> bool:
    """Whether this package differs from that commit while the benchmark starts."""
    return bool(_git("status", "--porcelain", "--", "."))


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "liger-kernel", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def report(result: dict[str, Any], console: Console) -> None:
    for case in (*result["cases"], *result["pointwise"]):
        shape, rows = Shape(**case["shape"]), case["variants"]
        size = f"T={shape.tokens} H={shape.width} V={shape.vocabulary}, {shape.active} active"
        table = Table(title=f"{size}, float32, 1 thread")
        for column in ("variant", "CPU s", "of naive", "of the GEMM limit", "peak MiB", "of naive"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        base = next(iter(rows.values()))
        for name, row in rows.items():
            if "error" in row:
                table.add_row(name, row["error"])
                continue
            table.add_row(
                name,
                f"{row['cpu_seconds']:.2f}",
                f"{row['cpu_seconds'] / base['cpu_seconds']:.2f}",
                f"{row['of_limit']:.2f}",
                f"{row['peak_extra_mib']:.0f}",
                f"{row['peak_extra_mib'] / base['peak_extra_mib']:.3f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--quick", action="store_true", help="one shape, no growth, nothing written")
    for task in ("measure", "peak"):
        parser.add_argument(f"--{task}", choices=ALL, help="one variant in this process, prints JSON")
    parser.add_argument("--shape", type=json.loads, help="of --measure and --peak")
    arguments = parser.parse_args()
    if arguments.measure or arguments.peak:
        shape = Shape(**arguments.shape)
        done = measure(arguments.measure, shape) if arguments.measure else peak_mib(arguments.peak, shape)
        print(json.dumps(done))
        return
    console = Console()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "git_commit": git_commit(),
        "machine": machine(),
        "uncommitted_changes": uncommitted_changes(),
        "versions": versions(),
        "threads": 1,
        "cases": [],
    }
    cases = [(VOCABULARIES[0], 0.5)] if arguments.quick else [(v, s) for v in VOCABULARIES for s in SHARES]
    for vocabulary, share in cases:
        shape = Shape(TOKENS, WIDTH, vocabulary, int(TOKENS * share))
        result["cases"].append({"shape": asdict(shape), "variants": compare(shape, console)})
    shape = Shape(TOKENS, WIDTH, VOCABULARIES[0], TOKENS // 2)
    result["pointwise"] = [
        {"shape": asdict(shape), "divergence": kind, "variants": compare(shape, console, variants)}
        for kind, variants in POINTWISE.items()
    ]
    if not arguments.quick:
        result["growth"] = growth(console)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    report(result, console)


if __name__ == "__main__":
    main()
