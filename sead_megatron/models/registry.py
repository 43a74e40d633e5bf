"""The model families this package knows: one line each."""

from __future__ import annotations

from sead_megatron.models.family import Family
from sead_megatron.models.llama import LLAMA

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA,)}
