"""Gradient accumulation is fused where a library brings it, never in the output layer, which Megatron does not run."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launch import run_ranks
from tests.tiny_families import SAVE_TINY


def test_fused_gradient_accumulation(tmp_path: Path) -> None:
    directory, apex = str(SAVE_TINY["llama"](tmp_path / "model")), tmp_path / "apex"
    apex.mkdir()
    report = run_ranks("layers", 1, tmp_path, directory=directory, apex=str(apex))
    assert report["on the CPU"] == report["without apex"] == []
    linear = ("mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    first = [f"decoder.layers.0.{name}.gradient_accumulation_fusion" for name in linear]
    fused = ["decoder.layers.0.mlp.linear_fc1.fuse_wgrad_accumulation", *first]
    assert [name for name in report["with apex"] if "layers.0." in name] == fused
    others = [name for name in report["with apex"] if "layers.0." not in name]
    assert others and all(name.startswith("decoder.layers.") for name in others)
    # megatron-core 0.19.2 rewraps an MLP that is given as a ModuleSpec, with a warning a layer.
    assert not [message for message in report["said"] if "Rewrapping" in message]
