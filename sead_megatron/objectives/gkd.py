"""GKD (arXiv 2306.13649): a generalised Jensen-Shannon divergence, or another, on rollouts and fixed responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sead_megatron.data.terms import Pointwise, Term
from sead_megatron.objectives.base import MixtureSection, Objective, coefficients_of
from sead_megatron.objectives.selection import reduced_to_rollouts

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable

# Kinds that need no rule: the split-KL kernel has them with two GEMMs less.
_WHOLE = {"forward": Term.FORWARD_KL, "reverse": Term.REVERSE_KL}


class GkdObjective(MixtureSection):
    """GKD (arXiv 2306.13649): the mean over rollouts of the mean divergence of their tokens.

    Its lambda, the student's fraction of the batches, is `student_share`.
    """

    name: Literal["gkd"] = "gkd"
    """`gkd`."""
    divergence: Literal["jsd", "forward", "reverse", "skew_forward", "skew_reverse"] = "jsd"
    """`jsd`: ``b KL(p || m) + (1 - b) KL(q || m)``, m = b p + (1 - b) q, with the teacher p and the student q.
    `skew_forward`: KL(p || a p + (1 - a) q), `skew_reverse`: KL(q || a q + (1 - a) p) (DistiLLM, arXiv 2402.03898)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """b of `jsd` (the paper: 0.1, 0.5 and 0.9), a of the skew divergences (DistiLLM: 0.1). Near 0 and 1 `jsd` tends to
    b and 1 - b times a KL divergence: 0.01 is about a hundred times smaller than `forward`."""


class Gkd(Objective[GkdObjective]):
    """The divergence is differentiated directly, the sampling is not."""

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        weights, normalizer = reduced_to_rollouts(table, table.every_token().float())
        kind = self.config.divergence
        if kind in _WHOLE:
            return coefficients_of(table, {_WHOLE[kind]: weights}, normalizer)
        rule = Pointwise(kind, self.config.share)
        return coefficients_of(table, {Term.FORWARD_KL: weights}, normalizer, divergence=rule)
