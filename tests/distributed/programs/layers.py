"""Which of a model's linear layers fuse gradient accumulation, and what Megatron says while it builds them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import rank
import torch


def body(directory: str, apex: str) -> dict[str, Any]:
    from sead_megatron.models import build
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.precision import Precision
    from sead_megatron.parallel.groups import student_groups
    from sead_megatron.parallel.layout import Layout

    said = Records()
    logging.getLogger("megatron").addHandler(said)
    model = build.build_model(
        read_hf_config(directory),
        student_groups(Layout(1, 1, 1)),
        Precision(torch.float32),
        on_cpu=True,
        trainable=True,
    )
    report: dict[str, Any] = {"said": said.messages}
    report["on the CPU"] = fusing(model.module)
    build._fuse_gradient_accumulation(model.module)
    report["without apex"] = fusing(model.module)
    Path(apex, "fused_weight_gradient_mlp_cuda").mkdir()
    Path(apex, "fused_weight_gradient_mlp_cuda/__init__.py").touch()
    sys.path.insert(0, apex)
    # As Transformer Engine's linear layers have it.
    model.module.decoder.layers[0].mlp.linear_fc1.fuse_wgrad_accumulation = False
    build._fuse_gradient_accumulation(model.module)
    report["with apex"] = fusing(model.module)
    return report


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def fusing(module: torch.nn.Module) -> list[str]:
    """Names of the layers that fuse, by either attribute."""
    names = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
    return sorted(
        f"{path}.{name}"
        for path, part in module.named_modules()
        for name in names
        if getattr(part, name, False)
    )


if __name__ == "__main__":
    rank.run(body)
