"""From the configuration's precision names to dtypes and Megatron's FP8 options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sead_megatron.config import PrecisionConfig
from sead_megatron.config.schema import FP8_RECIPES


@dataclass(frozen=True)
class Precision:
    """How a model stores and multiplies its weights."""

    dtype: torch.dtype
    """Of parameters, activations and everything that is not an FP8 GEMM."""
    fp8_recipe: str | None = None
    """Megatron's `fp8_recipe`, or None without FP8."""
    fp8_weights: bool = False
    """Keep linear weights in FP8 only: for a frozen model, whose masters nobody updates."""
    first_last_bfloat16: bool = True
    """Keep the first and the last decoder layer out of FP8."""
    modelopt: bool = False
    """ModelOpt will quantise the linear layers, so they must be Megatron's own."""

    def megatron_options(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        options: dict[str, Any] = {
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
        }
        if self.fp8_recipe is not None:
            options |= {
                # E4M3 for gradients too: with a scale per tensor or block it has range enough, and more precision.
                "fp8": "e4m3",
                "fp8_recipe": self.fp8_recipe,
                "fp8_param": self.fp8_weights,
                "first_last_layers_bf16": self.first_last_bfloat16,
            }
        return options


def student_precision(config: PrecisionConfig) -> Precision:
    """Of the trained model: parameters and float32 masters are the optimizer's, GEMMs may be FP8."""
    return _precision(config.student, config, fp8_weights=False)


def teacher_precision(config: PrecisionConfig) -> Precision:
    """Of the teachers. `modelopt_fp8` is bfloat16 here: ModelOpt quantises it once its weights are loaded."""
    if config.teacher == "modelopt_fp8":
        return Precision(torch.bfloat16, modelopt=True)
    return _precision(config.teacher, config, fp8_weights=True)


def reference_precision(config: PrecisionConfig) -> Precision:
    """Of the reference model: the teachers', except that ModelOpt quantises teachers only."""
    return replace(teacher_precision(config), modelopt=False)


def _precision(name: str, config: PrecisionConfig, *, fp8_weights: bool) -> Precision:
    if name not in FP8_RECIPES:
        return Precision(getattr(torch, name))
    return Precision(torch.bfloat16, FP8_RECIPES[name], fp8_weights, config.first_last_bfloat16)
