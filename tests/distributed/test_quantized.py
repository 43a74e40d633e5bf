"""ModelOpt's FP8 teacher gives the same scales in every layout of its own, whatever the student's layout is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_families import SAVE_TINY


def case(tensor: int, pipeline: int, *, keep: bool = False, own: bool = True) -> dict[str, Any]:
    return {"tensor": tensor, "pipeline": pipeline, "keep": keep, "own": own}


def spread(report: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest relative difference of any rank's scale from the reference's."""
    worst = 0.0
    for name, values in report["amax"].items():
        expected = reference["amax"][name][0]
        for value in values:
            worst = max(worst, *(abs(a - b) / b for a, b in zip(value, expected, strict=True)))
    return worst


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heterogeneous: attention left out of layers, linear replacements, several widths."""
    directory = tmp_path_factory.mktemp("quantized") / "teacher"
    return str(SAVE_TINY["nemotron_nas"](directory, seed=3))


def test_scales_do_not_depend_on_the_layout(teacher: str, tmp_path: Path) -> None:
    cases = [case(1, 1), case(2, 1), case(1, 2), case(1, 1, keep=True), case(1, 2, keep=True)]
    whole, tensor, pipeline, kept, kept_stages = run_ranks(
        "quantized", 2, tmp_path, directory=teacher, cases=cases
    )
    assert max(report["rounding"] for report in (whole, tensor, pipeline)) <= 1e-6
    assert whole["amax"].keys() == tensor["amax"].keys() == pipeline["amax"].keys()
    # An activation's amax is that of values already rounded to E4M3 in the layers before it: float32 noise of TP can
    # move one of those to the neighbouring grid point.
    assert spread(tensor, whole) <= 0.02
    assert spread(pipeline, whole) <= 1e-6
    layers = {name.split(".")[2] for name in whole["amax"]}
    inner = {name.split(".")[2] for name in kept["amax"]}
    assert inner == layers - {min(layers, key=int), max(layers, key=int)}
    assert kept_stages["amax"].keys() == kept["amax"].keys()
    assert kept["hidden"] != whole["hidden"]


@pytest.mark.slow
def test_without_its_own_groups_stages_mix_their_scales(tmp_path: Path) -> None:
    """Negative control of `_use_own_groups`: the student's data-parallel group holds both of the teacher's stages."""
    directory = str(SAVE_TINY["qwen3"](tmp_path / "teacher", seed=3))
    cases = [case(1, 1), case(1, 2, own=False)]
    whole, pipeline = run_ranks("quantized", 2, tmp_path, directory=directory, cases=cases)
    assert spread(pipeline, whole) > 0.05
