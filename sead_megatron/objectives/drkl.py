"""DRKL (arXiv 2604.00223): reverse KL whose part off the target token keeps a constant weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sead_megatron.data.terms import Term
from sead_megatron.objectives.base import MixtureSection, Objective, coefficients_of
from sead_megatron.section import NonNegativeFloat

if TYPE_CHECKING:
    from sead_megatron.data.types import Coefficients, TokenTable

# The part off the target is divided by 1 - q(y): below this its weight fades, where float32 has no digits left.
_SMALLEST_REST = 1e-3


class DrklObjective(MixtureSection):
    """DRKL (arXiv 2604.00223): ``KL(binary: target or not) + gamma KL(q^ || p^)``, q^ and p^ without the target.

    Published for fixed texts, whose next token is the target (`student_share: 0`).
    """

    name: Literal["drkl"] = "drkl"
    """`drkl`."""
    gamma: NonNegativeFloat = 0.5
    """Weight off the target, where the reverse KL itself has 1 - q(y); 0.5 is in the paper's stable range."""
    target: Literal["teacher", "sampled"] = "teacher"
    """The target in rollouts, of which the paper has none: the teacher's likeliest token or the sampled one."""


class Drkl(Objective[DrklObjective]):
    """Mean over all response tokens, with the gradient of ``a RKL + b log q(y)``; y is the target, a and b detached:

    ``a = gamma / (1 - q_y)``, ``b = q_y D + a (c - RKL)``, ``D = log(q_y / p_y) - log((1 - q_y) / (1 - p_y))`` and
    ``c = (RKL - q_y log(q_y / p_y)) / (1 - q_y)``. (c is what KL(q^ || p^) and the tails' log-ratio sum to.)
    """

    @property
    def teacher_argmax(self) -> bool:
        return self.config.target == "teacher" and self.config.own_batches > 0

    def needs_token_stats(self, step: int) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        # Only rollouts have the engine's logprobs: a fixed response's next token is the target itself.
        teacher_argmax = self.teacher_argmax and table.rollout_logprob is not None
        prefix = "argmax_" if teacher_argmax else ""
        log_q, log_p = (
            table.require(f"{prefix}{name}").double() for name in ("student_logprob", "teacher_logprob")
        )
        reverse_kl = table.require("reverse_kl").double()
        rest_q, rest_p = ((-values.expm1()).clamp_min(_SMALLEST_REST) for values in (log_q, log_p))
        on_target = log_q - log_p
        contrast = on_target - (rest_q.log() - rest_p.log())
        off_target = (reverse_kl - log_q.exp() * on_target) / rest_q
        scale = self.config.gamma / rest_q
        weights = {
            Term.REVERSE_KL: scale.float(),
            Term.LOGPROB: (log_q.exp() * contrast + scale * (off_target - reverse_kl)).float(),
        }
        return coefficients_of(table, weights, float(table.num_tokens), teacher_argmax=teacher_argmax)
