"""Objectives: one file and one line of ``OBJECTIVES`` each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from sead_megatron.objectives.akl import Akl, AklObjective
from sead_megatron.objectives.base import Objective, ObjectiveSection
from sead_megatron.objectives.dasd import Dasd, DasdObjective
from sead_megatron.objectives.decoupled import Decoupled, DecoupledObjective
from sead_megatron.objectives.drkl import Drkl, DrklObjective
from sead_megatron.objectives.egrsd import Egrsd, EgrsdObjective
from sead_megatron.objectives.eopd import Eopd, EopdObjective
from sead_megatron.objectives.gkd import Gkd, GkdObjective
from sead_megatron.objectives.gopd import Gopd, GopdObjective
from sead_megatron.objectives.grpo import Grpo, GrpoObjective
from sead_megatron.objectives.lightning import Lightning, LightningObjective
from sead_megatron.objectives.mopd import Mopd, MopdObjective
from sead_megatron.objectives.opd import Opd, OpdObjective
from sead_megatron.objectives.opsd import Opsd, OpsdObjective
from sead_megatron.objectives.paced import Paced, PacedObjective
from sead_megatron.objectives.reopold import Reopold, ReopoldObjective
from sead_megatron.objectives.scope import Scope, ScopeObjective
from sead_megatron.objectives.sead import Sead, SeadObjective
from sead_megatron.objectives.sekd import Sekd, SekdObjective
from sead_megatron.objectives.teachable import Teachable, TeachableObjective
from sead_megatron.objectives.tip import Tip, TipObjective
from sead_megatron.objectives.topk_opd import TopkOpd, TopkOpdObjective
from sead_megatron.objectives.vopd import Vopd, VopdObjective

# Name -> its section of the configuration and what computes it.
OBJECTIVES: dict[str, tuple[type[ObjectiveSection], type[Objective[Any]]]] = {
    "sead": (SeadObjective, Sead),
    "opd": (OpdObjective, Opd),
    "akl": (AklObjective, Akl),
    "dasd": (DasdObjective, Dasd),
    "decoupled": (DecoupledObjective, Decoupled),
    "drkl": (DrklObjective, Drkl),
    "gkd": (GkdObjective, Gkd),
    "eopd": (EopdObjective, Eopd),
    "egrsd": (EgrsdObjective, Egrsd),
    "gopd": (GopdObjective, Gopd),
    "opsd": (OpsdObjective, Opsd),
    "grpo": (GrpoObjective, Grpo),
    "mopd": (MopdObjective, Mopd),
    "lightning": (LightningObjective, Lightning),
    "paced": (PacedObjective, Paced),
    "reopold": (ReopoldObjective, Reopold),
    "scope": (ScopeObjective, Scope),
    "sekd": (SekdObjective, Sekd),
    "topk_opd": (TopkOpdObjective, TopkOpd),
    "teachable": (TeachableObjective, Teachable),
    "tip": (TipObjective, Tip),
    "vopd": (VopdObjective, Vopd),
}

if TYPE_CHECKING:
    AnyObjective = ObjectiveSection
else:
    AnyObjective = Annotated[
        Union[tuple(section for section, _ in OBJECTIVES.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]
"""The field `objective` of the configuration: any of the sections, told apart by `name`."""


def build_objective(config: ObjectiveSection, total_steps: int) -> Objective[Any]:
    """The objective that ``config.name`` says, for a run of ``total_steps`` updates."""
    return OBJECTIVES[config.name][1](config, total_steps)


__all__ = ["OBJECTIVES", "AnyObjective", "Objective", "ObjectiveSection", "build_objective"]
