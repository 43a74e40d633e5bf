"""Rotary frequencies of YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sead_megatron.models.architecture import YarnRope


@lru_cache(maxsize=8)
def yarn_angles(rope: YarnRope, theta: float, head_dim: int, length: int, device: torch.device) -> Tensor:
    """Angles of every position, float32 [length, 1, 1, head_dim], as Megatron passes them to its layers.

    The same for all layers of a model, which therefore share it.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, yarn_frequencies(rope, theta, head_dim).to(device))
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def yarn_frequencies(rope: YarnRope, theta: float, head_dim: int) -> Tensor:
    """Inverse frequencies, float32 [head_dim / 2]: divided by the factor where a dimension turns less than
    `beta_slow` times over the original length, unchanged where it turns more than `beta_fast` times, a ramp
    between. In transformers' order of operations, for the same bits."""
    periods = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low = max(math.floor(_dimension_of(rope.beta_fast, rope, theta, head_dim)), 0)
    high = min(math.ceil(_dimension_of(rope.beta_slow, rope, theta, head_dim)), head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _dimension_of(turns: float, rope: YarnRope, theta: float, head_dim: int) -> float:
    """The dimension that turns so many times over the original length."""
    return (
        head_dim
        * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(theta))
    )
