"""The gradient of the whole step, from both output layers to the embedding, against finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.distributed.launch import run_ranks
from tests.tiny_models import save_tiny_llama

LAYOUTS = {"TP2": [2, 1], "TP2 sequence": [2, 1, True], "PP2": [1, 2]}
# Float64 and a fourth-order stencil leave about 1e-9; what a dropped or doubled part makes is above 1e-3.
RELATIVE = 1e-6
NUM_DIRECTIONS = 3


def _write_directions(model: Path, target: Path, seed: int) -> None:
    """Random tensors of the model's names and shapes, each of the norm of the tensor it stands for."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        directions[name] = noise * (tensor.double().norm() / noise.norm())
    save_file(directions, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((model / "config.json").read_bytes())


def test_directional_derivatives(tmp_path: Path) -> None:
    """Loss (zones fixed) of several packed rows through two layers, tied and untied, TP2, TP2 with SP, and PP2.

    Guards what no layout comparison can: that all layouts are wrong together.
    """
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    students = {
        name: save_tiny_llama(tmp_path / name, seed=1, tie_word_embeddings=name == "tied", **shape)
        for name in ("untied", "tied")
    }
    teacher = save_tiny_llama(tmp_path / "teacher", seed=2, initializer_range=0.1)
    directions = [tmp_path / f"direction_{i}" for i in range(NUM_DIRECTIONS)]
    for seed, path in enumerate(directions):
        for name, student in students.items():
            _write_directions(student, path / name, seed)
    cases = [
        {"model": model, "student": layout, "teacher": [1, 1]}
        for model in students
        for layout in LAYOUTS.values()
    ]
    reports = run_ranks(
        "finite_difference",
        2,
        tmp_path,
        students={name: str(path) for name, path in students.items()},
        teacher=str(teacher),
        directions=[str(path) for path in directions],
        cases=cases,
    )
    for case, pairs in zip(cases, reports, strict=True):
        errors = [abs(analytic - numeric) / abs(numeric) for analytic, numeric in pairs]
        print(case["model"], case["student"], errors, pairs)
        assert len(errors) == NUM_DIRECTIONS
        assert max(errors) <= RELATIVE, (case, pairs)
