"""A student equal to its teacher, each in a layout of its own, has nothing to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.distributed.launch import run_ranks
from tests.tiny_models import save_tiny_llama

LAYOUTS: list[dict[str, Any]] = [
    {"student": [2, 1], "teacher": [1, 2]},
    {"student": [1, 2], "teacher": [2, 1]},
    {"student": [2, 1, True], "teacher": [1, 1]},
]


def _perturbed(source: Path, target: Path) -> Path:
    """The model with every weight 1 % off, at random: w * (1 + 0.01 * N(0, 1))."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    changed = {
        name: t * (1 + 0.01 * torch.randn(t.shape, generator=generator)) for name, t in tensors.items()
    }
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_equal_models_in_unequal_layouts(tmp_path: Path) -> None:
    """Forward and reverse KL of every token are rounding noise, and so is the gradient.

    A wrong shard, a mixed-up token or a temperature on one side only would lift the floor. The scale is the gradient
    that a perturbation of 1 % of the weights gives.
    """
    teacher = save_tiny_llama(tmp_path / "teacher", seed=2, initializer_range=0.1)
    students = {"equal": str(teacher), "perturbed": str(_perturbed(teacher, tmp_path / "perturbed"))}
    cases = [
        {"model": model, "max_tokens": 128, "packing": True, "temperature": 1.3} | layout
        for layout in LAYOUTS
        for model in students
    ]
    reports = run_ranks(
        "update", 2, tmp_path, students=students, teacher=str(teacher), cases=cases, references=str(tmp_path)
    )
    for i, layout in enumerate(LAYOUTS):
        equal, perturbed = reports[2 * i : 2 * i + 2]
        print(layout, equal["forward_kl_max"][0], equal["grad_norm"][0] / perturbed["grad_norm"][0])
        assert equal["forward_kl_max"][0] <= 1e-6, layout
        assert equal["reverse_kl_max"][0] <= 1e-6, layout
        assert perturbed["forward_kl_max"][0] > 1e-4, layout
        assert equal["grad_norm"][0] <= 1e-4 * perturbed["grad_norm"][0], layout
