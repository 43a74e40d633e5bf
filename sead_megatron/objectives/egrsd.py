"""EGRSD and CL-EGRSD (arXiv 2605.13255): rewards as the direction, a privileged teacher as the size of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sead_megatron.objectives.advantages import RunningMoments, group_advantages, log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, PolicyGradientSection
from sead_megatron.objectives.selection import lookahead_min
from sead_megatron.section import NonNegativeFloat, NonNegativeInt

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.data.types import Coefficients, TokenTable

_SMALLEST_WEIGHT = 0.1
_SMALLEST_MAXIMUM = 1.0  # nat


class EgrsdObjective(PolicyGradientSection):
    """EGRSD (arXiv 2605.13255): ``-1/sum m * sum A_i w_t omega_t log q(y_t)``; `look_ahead` > 0 is CL-EGRSD.

    Not published: ratio_clip, length_bonus and the learning rate; defaults are those of RLSD (arXiv 2604.03128), small,
    and none.
    """

    name: Literal["egrsd"] = "egrsd"
    """`egrsd`."""
    gamma: NonNegativeFloat = 0.1
    """Strength of the entropy gate; 0.1 to 0.3 are called stable, 0.1 is best at 8B."""
    look_ahead: NonNegativeInt = 0
    """W of CL-EGRSD: a token's entropy is the smallest of the next W too (the paper's best: 5). 0: EGRSD."""
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The weight of the teacher's ratio is kept within 1 +- this."""
    length_bonus: NonNegativeFloat = 0.1
    """Beta_L: a right answer's reward is 1 + this (1 - length / longest response)."""
    whiten: Literal["running", "group"] = "running"
    """`running`: by mean and deviation of all rewards so far, for one rollout a prompt. `group`: within the prompt."""

    needs_rewards: ClassVar[bool] = True

    @property
    def needs_solutions(self) -> bool:
        return True


class Egrsd(Objective[EgrsdObjective]):
    """The teacher sees a gold solution. Per token:

    - ratio ``w = (p(y) / q(y)) ^ sign(A)``, clipped;
    - gate ``omega = clip(1 - gamma H / max(1 nat, max H), 0.1, 1)``, the maximum over the global batch.
    """

    def __init__(self, config: EgrsdObjective, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self._moments = RunningMoments()

    @property
    def needs_teacher_entropy(self) -> bool:
        return True

    @property
    def needs_teacher_logprob(self) -> bool:
        return True

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        config, facts = self.config, table.facts()
        shorter = 1 - table.lengths.double() / facts.longest
        reward = facts.reward.double() * (1 + config.length_bonus * shorter)
        whole = (
            self._moments.whiten(reward)
            if config.whiten == "running"
            else group_advantages(reward, facts.group)
        )
        direction = table.of_tokens(whole.float())
        ratio = (
            (direction.sign() * log_ratio(table)).exp().clamp(1 - config.ratio_clip, 1 + config.ratio_clip)
        )
        gate = self.gate(table)
        metrics = {"reward/mean": float(reward.mean())}
        if table.num_tokens:
            metrics["gate/mean"] = float(gate.double().mean())
        return policy_gradient(
            table, direction * ratio * gate, float(table.num_tokens), config.importance_clip, metrics=metrics
        )

    def gate(self, table: TokenTable) -> Tensor:
        """omega, [N]."""
        entropy = table.require("teacher_entropy")
        largest = max(float(entropy.max()), _SMALLEST_MAXIMUM) if len(entropy) else _SMALLEST_MAXIMUM
        ahead = lookahead_min(table, entropy / largest, self.config.look_ahead)
        return (1 - self.config.gamma * ahead).clamp(_SMALLEST_WEIGHT, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return self._moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments.load_state_dict(state)
