"""Numbers in documents are those of the committed results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("benchmark", "results", "document"),
    [
        ("convert_memory", "convert_memory", "conversion"),
        ("data_preparation", "data_preparation", "data"),
        ("fp8_teacher", "fp8_teacher", "precision"),
        ("grader_rates", "grader_rates", "grading"),
        ("profile_trace", "profile_quickstart", "profiling"),
        ("smollm2_evaluation", "smollm2_evaluation", "evaluation"),
    ],
)
def test_table_of_a_benchmark(benchmark: str, results: str, document: str) -> None:
    results = f"benchmarks/results/{results}.json"
    command = [sys.executable, f"benchmarks/{benchmark}.py", "--table", results]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / f"docs/{document}.md").read_text()


def test_tables_of_the_ablation() -> None:
    command = [sys.executable, "benchmarks/ablation/table.py", "benchmarks/results/ablation.json"]
    tables = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    document = (ROOT / "docs/ablation.md").read_text()
    for table in tables.split("\n\n"):
        assert table in document


def test_table_of_metrics() -> None:
    command = [sys.executable, "tools/document_metrics.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs/metrics.md").read_text(), "run python tools/document_metrics.py --write"


def test_table_of_the_rehearsal() -> None:
    """Written by `make rehearse`, which needs wheels that this suite does not."""
    measured = json.loads((ROOT / "benchmarks/results/rehearsal.json").read_text())["cases"]
    document = (ROOT / "docs/gpu.md").read_text()
    assert len(measured) > 10
    for name, case in measured.items():
        ratios = [f"{case['of the plan'][phase]:.3f}" for phase in ("build", "teacher", "update", "sync")]
        assert f"| {' | '.join([name, *ratios])} |" in document, name
