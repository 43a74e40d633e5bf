"""The benchmark programs run, and what they print follows from what they measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sead_kernels.split_kl import BACKENDS, bench, bench_gpu, bench_report
from sead_kernels.split_kl.bench_variants import POINTWISE, VARIANTS, Inputs, Shape

OURS = [name for name in VARIANTS if name not in ("Liger JSD", "TRL divergence")]


@pytest.mark.parametrize("name", OURS)
def test_variants_compute_the_same_loss_and_gradients(name: str) -> None:
    """The peers are compared in the benchmark's own environment, by the benchmark."""
    shape = Shape(tokens=32, width=16, vocabulary=300, active=8)
    first, x = Inputs.make(shape), Inputs.make(shape)
    expected = VARIANTS["naive"].run(first, bench.TileOptions())
    variant = VARIANTS[name]
    reason = BACKENDS[variant.backend].unavailable(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    loss = variant.run(x, bench.TileOptions(backend=variant.backend, cache_mib=int(variant.cache)))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(x.hidden.grad, first.hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.weight.grad, first.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", POINTWISE)
def test_variants_of_a_pointwise_divergence_agree(kind: str) -> None:
    shape = Shape(tokens=32, width=16, vocabulary=300, active=8)
    (first, *others) = POINTWISE[kind].values()
    wanted = Inputs.make(shape)
    expected = first.run(wanted, bench.TileOptions())
    assert expected > 0
    for variant in others:
        if BACKENDS[variant.backend].unavailable(torch.device("cpu"), torch.float32) is not None:
            continue
        x = Inputs.make(shape)
        loss = variant.run(x, bench.TileOptions(backend=variant.backend, cache_mib=int(variant.cache)))
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(x.hidden.grad, wanted.hidden.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(x.weight.grad, wanted.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_run_with_pointwise_divergences(tmp_path: Path) -> None:
    """At a tiny size: a process for each number of two variants, and the table made of them."""
    small = Shape(256, 32, 4096, 128)
    variants = {name: POINTWISE["jsd"][name] for name in ("naive, active rows, jsd", "split_kl torch, jsd")}
    console = Console(file=(tmp_path / "log").open("w"))
    rows = bench.compare(small, console, variants)
    assert list(rows) == list(variants)
    assert not any("error" in row for row in rows.values()), rows
    cases = [{"shape": asdict(small), "divergence": "jsd", "variants": rows}]
    page = bench_report.markdown(committed() | {"pointwise": cases})
    assert "Pointwise divergences, V = 4096, T = 256, H = 32, 50% active:" in page
    assert "| split_kl torch, jsd | " in page


def test_a_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    row = bench.measure("split_kl torch", Shape(32, 16, 300, 8))
    assert row["gemm_flops"] == 6 * 2 * 8 * 16 * 300
    assert row["of_limit"] == pytest.approx(
        row["gemm_flops"] / 1e9 / row["sgemm_gflops"] / row["cpu_seconds"]
    )


def test_exponents_are_slopes() -> None:
    assert bench.fitted_exponent([(1, 3.0), (2, 6.0), (4, 12.0)]) == pytest.approx(1.0)
    assert bench.fitted_exponent([(1, 8.0), (2, 4.0), (8, 1.0)]) == pytest.approx(-1.0)


def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(bench_report.RESULTS.read_text())
    return result


def test_the_page_shows_the_committed_results() -> None:
    readme = bench_report.README.read_text()
    assert readme == bench_report.with_results(readme, committed()), "run bench_report --write"


def test_committed_results_are_complete_and_linear() -> None:
    """Whoever commits a slower or hungrier kernel has to say so here."""
    result = committed()
    assert len(result["cases"]) == len(bench.VOCABULARIES) * len(bench.SHARES)
    for case in result["cases"]:
        rows = case["variants"]
        assert list(rows) == list(VARIANTS)
        assert not any("error" in row for row in rows.values())
        kept, ours = rows["split_kl cpu, logits kept"], rows["split_kl cpu"]
        peers = [row for name, row in rows.items() if not name.startswith("split_kl")]
        assert kept["cpu_seconds"] < min(peer["cpu_seconds"] for peer in peers)
        assert kept["peak_extra_mib"] < min(peer["peak_extra_mib"] for peer in peers)
        assert ours["peak_extra_mib"] <= 0.1 * rows["naive"]["peak_extra_mib"]
    for what, fit in result["growth"].items():
        expected = -1 if what == "tensor-parallel size" else 1
        assert fit["exponent"] == pytest.approx(expected, abs=0.15), what


def test_the_gpu_benchmark_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    sizes = "--tokens 24 --active 12 --student-width 16 --teacher-width 32 --vocabulary 512 --tp 2 --topk 8"
    tiles = "--token-tiles 16 --vocab-tiles 64 128 --repeats 1 --device cpu"
    bench_gpu.main([*sizes.split(), *tiles.split(), f"--output={output}"])
    result = json.loads(output.read_text())
    backends = {record["backend"] for record in result["records"]}
    assert "torch" in backends and result["problem"]["rows"] == 256
    assert len(result["records"]) == 3 * 2 * len(backends)
    for record in result["records"]:
        flops = bench_gpu.Problem(**result["problem"]).flops()[record["pass"]]
        assert record["tflops"] == pytest.approx(flops / record["milliseconds"] / 1e9)
    both = [r for r in result["records"] if r["pass"] != "teacher top-k"]

    def total(setting: tuple[str, int]) -> float:
        return sum(r["milliseconds"] for r in both if (r["backend"], r["tile_vocab"]) == setting)

    settings = {(r["backend"], r["tile_vocab"]) for r in both}
    fastest = result["fastest"]
    assert min(settings, key=total) == (fastest["backend"], fastest["tile_vocab"])
