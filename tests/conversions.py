"""Conversions of tiny models, and ways to damage what they read and write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sead_megatron.errors import UserError
from sead_megatron.models.convert import Options, convert, plan_conversion
from sead_megatron.models.convert_verify import verify

ROOT = Path(__file__).parents[1]
# A vocabulary of 250, padded to 256; several files, several chunks of a parameter in rows and columns.
SMALL = Options(shard_bytes=100_000, chunk_bytes=4096)


def run(source: Path, target: Path, options: Options = SMALL) -> list[int]:
    """Converts and compares; the steps of the progress."""
    steps: list[int] = []
    plan = plan_conversion(source, target, options)
    convert(plan, steps.append, lambda directory: verify(plan, directory, lambda size: None))
    assert sum(steps) == plan.tensor_bytes
    return steps


def mistake(source: Path, target: Path, options: Options = SMALL) -> str:
    """What a conversion is refused for, with SRC and DIR (of the output) for the directories."""
    with pytest.raises(UserError) as caught:
        run(source, target, options)
    return str(caught.value).replace(str(source), "SRC").replace(str(target.parent), "DIR")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    return {
        name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].numpy().tobytes() == theirs[name].numpy().tobytes()
        for name in ours
    )


def edit_config(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(content))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        stored = tensors(directory)
        change(stored)
        save_file(stored, directory / "model.safetensors")

    return damage


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - size)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
