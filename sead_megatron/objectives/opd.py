"""Vanilla on-policy distillation: the full reverse KL on every response token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sead_megatron.data.types import Coefficients, Term, TokenTable
from sead_megatron.objectives.base import token_metrics

if TYPE_CHECKING:
    from sead_megatron.config.objective import OpdObjective


class Opd:
    """``L = 1/N * sum_t RKL_t`` over the N response tokens of the global batch.

    Source: arXiv 2606.28562, Eq. 2 and the baseline of section 3.1 ("full-token RKL"). The divergence is
    differentiated directly; this is not the sampled-token policy gradient ("RKL k=1" in the paper's tables).
    """

    needs_teacher_entropy = False
    uses_trainer_entropy = False
    teacher_topk = 0

    def __init__(self, config: OpdObjective, total_steps: int) -> None:
        pass

    def needs_token_stats(self, step: int) -> bool:
        return False

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        weights = torch.zeros(table.num_tokens, len(Term), dtype=torch.float32, device=table.device)
        weights[:, Term.REVERSE_KL] = 1.0
        return Coefficients(
            weights=weights,
            normalizer=float(max(1, table.num_tokens)),
            metrics=token_metrics(table, active=table.num_tokens),
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"opd has no state, got {sorted(state)}")
