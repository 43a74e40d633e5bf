"""Objectives: one file and one line of ``OBJECTIVES`` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sead_megatron.objectives.base import Objective
from sead_megatron.objectives.opd import Opd
from sead_megatron.objectives.sead import Sead

if TYPE_CHECKING:
    from sead_megatron.config.objective import Objective as ObjectiveConfig

OBJECTIVES: dict[str, Callable[[Any, int], Objective]] = {
    "opd": Opd,
    "sead": Sead,
}


def build_objective(config: ObjectiveConfig, total_steps: int) -> Objective:
    """The objective that ``config.name`` says, for a run of ``total_steps`` updates."""
    return OBJECTIVES[config.name](config, total_steps)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
