"""The model families this package knows: one line each. Torch-free."""

from __future__ import annotations

from sead_megatron.models.family import Family
from sead_megatron.models.llama import LLAMA
from sead_megatron.models.nemotron_nas import NEMOTRON_NAS
from sead_megatron.models.olmo3 import OLMO3
from sead_megatron.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, NEMOTRON_NAS, OLMO3, QWEN3)}
