"""Vanilla on-policy distillation: the reverse KL on every response token, in full or through the sampled token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sead_megatron.data.terms import Term
from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection, coefficients_of

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable


class OpdObjective(PolicyGradientSection):
    """Vanilla on-policy distillation: reverse KL, student to teacher, on every response token.

    Ambiguity: SEAD's tables call the baseline "OPD (RKL k=1)", its section 3.1 "full-token RKL": `form` has both.
    """

    name: Literal["opd"] = "opd"
    """`opd`."""
    form: Literal["full", "sampled"] = "full"
    """`full`: the divergence over the whole vocabulary, differentiated directly. `sampled`: policy gradient with the
    advantage log p(y) - log q(y) of the sampled token, an unbiased estimate of the same gradient (Thinking Machines,
    2025; "k=1")."""

    @property
    def follows_sampled_tokens(self) -> bool:
        return self.form == "sampled"


class Opd(Objective[OpdObjective]):
    """``L = 1/N * sum_t RKL_t`` over the N response tokens of the global batch.

    Source: arXiv 2606.28562, Eq. 2 and the baseline of section 3.1.
    """

    @property
    def needs_teacher_logprob(self) -> bool:
        return self.config.form == "sampled"

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        if self.config.form == "full":
            return coefficients_of(table, {Term.REVERSE_KL: 1.0}, float(table.num_tokens))
        return policy_gradient(table, log_ratio(table), float(table.num_tokens), self.config.importance_clip)
