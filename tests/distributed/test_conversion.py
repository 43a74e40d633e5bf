"""Weights from Hugging Face into Megatron and back: logits, gradients and export in every layout, of every family.

Float64 leaves nothing to rounding: a wrong rotation, a swapped projection or another epsilon shows at 1e-12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_families import SAVE_TINY, save_tiny_qwen3
from tests.tiny_models import save_tiny_llama

ALONE = {"tensor": 1, "pipeline": 1}
PARALLEL = {
    "TP2": {"tensor": 2, "pipeline": 1},
    "PP2": {"tensor": 1, "pipeline": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 sequence": {"tensor": 2, "pipeline": 1, "sequence": True},
    "TP4": {"tensor": 4, "pipeline": 1},
    "PP4 1+1+1+n": {"tensor": 1, "pipeline": 4, "stages": "uneven"},
}
# Measured: logits at most 5e-14 in float64 and 2e-5 in float32, at logits of up to 12; gradients, whose buffers are
# float32 in both, 2e-7 and 7e-6 of a tensor's largest.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}
GRADIENT_TOLERANCE = {"float64": 1e-6, "float32": 1e-5}
FLOAT32_LAYOUT = "TP2 sequence"
LAYERS = {"nemotron_nas": 6}


def _runs(model: str, layout: str, dtype: str) -> bool:
    """Float32 in one parallel layout; tied models where it matters; KV heads (of Nemotron-NAS 2) allow the TP."""
    if layout == "alone":
        return True
    if dtype == "float32" and layout != FLOAT32_LAYOUT:
        return False
    if model.startswith("tied"):
        return layout in ("PP2", "TP2 PP2", "TP4")
    return (model, layout) != ("nemotron_nas", "TP4")


FAULTS = {
    "swapped gate and up": "llama",
    "concatenated q k v": "llama",
    "wrong eps": "llama",
    "no rope scaling": "llama",
    "another rope base": "qwen3",
    "swapped q and k norms": "qwen3",
    "window off by one": "olmo3",
    "YaRN everywhere": "olmo3",
    "no attention factor": "olmo3",
    "norms after the sublayers left out": "olmo3",
}
PARALLEL_FAULTS = {
    "QK norm without all-reduce": "olmo3",
    "linear sublayer of this rank only": "nemotron_nas",
}
GRADIENT_FAULTS = {
    "QK norm without backward all-reduce": "olmo3",
    "QK norm gradients not summed over TP": "qwen3",
}
Results = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family, and two with tied embeddings; the vocabulary of 250 is padded to 256 in every layout."""
    path = tmp_path_factory.mktemp("models")
    saved = {name: save(path / name) for name, save in SAVE_TINY.items()}
    saved["tied llama"] = save_tiny_llama(
        path / "tied_llama", tie_word_embeddings=True, num_key_value_heads=8
    )
    saved["tied qwen3"] = save_tiny_qwen3(path / "tied_qwen3", tie_word_embeddings=True)
    return {name: str(directory) for name, directory in saved.items()}


def _layout(model: str, name: str) -> dict[str, Any]:
    layout = ({"alone": ALONE} | PARALLEL)[name]
    if layout.get("stages") != "uneven":
        return layout
    return layout | {"stages": [1, 1, 1, LAYERS.get(model, 4) - 3]}


def _run(models: dict[str, str], layouts: list[str], faults: dict[str, str], ranks: int, path: Path) -> Any:
    keys = [
        (model, name, dtype)
        for model in models
        for name in layouts
        for dtype in TOLERANCE
        if _runs(model, name, dtype)
    ]
    cases = [
        {"directory": models[m], "layout": _layout(m, name), "dtype": dtype, "gradients": name != "TP4"}
        for m, name, dtype in keys
    ]
    wrong = {"layout": PARALLEL["TP2"] if ranks > 1 else ALONE, "dtype": "float64", "gradients": ranks > 1}
    cases += [wrong | {"directory": models[model], "fault": fault} for fault, model in faults.items()]
    reports = run_ranks("conversion", ranks, path, cases=cases, target=str(path))
    return dict(zip([*keys, *faults], reports, strict=True))


@pytest.fixture(scope="module")
def one_rank(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return _run(models, ["alone"], FAULTS, 1, tmp_path_factory.mktemp("one_rank"))


@pytest.fixture(scope="module")
def four_ranks(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    faults = PARALLEL_FAULTS | GRADIENT_FAULTS
    return _run(models, list(PARALLEL), faults, 4, tmp_path_factory.mktemp("four_ranks"))


def _check(results: dict[Any, Any]) -> None:
    """Every difference is within its dtype's tolerance, and every export gives back the very bits."""
    for key, result in results.items():
        if isinstance(key, str):
            continue
        dtype = key[2]
        case = f"{key}: {result}"
        assert result["scale"] > 1, case
        assert result["difference"] <= TOLERANCE[dtype], case
        assert result.get("gradients", 0) <= GRADIENT_TOLERANCE[dtype], case
        assert result["equal"] and result["indexed"] and result["files"] > 1, case
        assert result["vocab"] == [250, 256], case


def test_every_family_on_one_rank(one_rank: dict[Any, Any]) -> None:
    """TP1 PP1 equals transformers (Nemotron-NAS: a reference of its own); the export is sharded and bit-equal."""
    assert len(one_rank) == 6 * 2 + len(FAULTS)
    _check(one_rank)


def test_every_family_in_every_layout(four_ranks: dict[Any, Any]) -> None:
    """Shards are the right parts of the same model; gradients too, with and without sequence parallelism."""
    families, tied = 4 * len(PARALLEL) - 1 + 4, 2 * 3
    assert len(four_ranks) == families + tied + len(PARALLEL_FAULTS | GRADIENT_FAULTS)
    _check(four_ranks)


def test_stages_are_balanced_by_parameters(four_ranks: dict[Any, Any]) -> None:
    """The first two layers of the Nemotron-NAS model weigh as much as the other four; given stages are kept."""
    assert four_ranks["nemotron_nas", "PP2", "float64"]["layers"] == 2
    assert four_ranks["llama", "PP2", "float64"]["layers"] == 2
    assert four_ranks["nemotron_nas", "PP4 1+1+1+n", "float64"]["layers"] == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_wrong_conversion(one_rank: dict[Any, Any], fault: str) -> None:
    """Negative controls: typical conversion mistakes move the logits by far more than the tolerance."""
    assert one_rank[fault]["difference"] > 1e-3, one_rank[fault]


@pytest.mark.parametrize("fault", PARALLEL_FAULTS)
def test_the_comparison_sees_a_missing_collective(four_ranks: dict[Any, Any], fault: str) -> None:
    assert four_ranks[fault]["difference"] > 1e-3, four_ranks[fault]


@pytest.mark.parametrize("fault", GRADIENT_FAULTS)
def test_the_comparison_sees_a_wrong_gradient(four_ranks: dict[Any, Any], fault: str) -> None:
    """These leave the logits alone."""
    assert four_ranks[fault]["difference"] <= TOLERANCE["float64"], four_ranks[fault]
    assert four_ranks[fault]["gradients"] > 1e-3, four_ranks[fault]
