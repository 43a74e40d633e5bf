"""Lightning OPD (arXiv 2604.13010): sampled OPD on cached responses of the initial student, scored once."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sead_megatron.errors import UserError
from sead_megatron.objectives.advantages import log_ratio, policy_gradient
from sead_megatron.objectives.base import Objective, ObjectiveSection
from sead_megatron.section import PositiveFloat

if TYPE_CHECKING:
    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Coefficients, TokenTable


class LightningObjective(ObjectiveSection):
    """Lightning OPD (arXiv 2604.13010): ``-A log q(y)`` on `data.cache`, A = log p(y) - log q(y) with cached log p.

    The student must have been fine-tuned on responses of the very teacher that scored the cache ("teacher
    consistency"); nothing here can check that. Responses stay those of the initial student: keep runs short.
    """

    name: Literal["lightning"] = "lightning"
    """`lightning`."""
    advantage_clip: PositiveFloat | None = Field(default=None, examples=[5.0])
    """Cut A to [-this, this], nats. Default: not.

    Ambiguity: the paper's theory clips, its released code does not; the size of the clip is not published."""

    reads_cache: ClassVar[bool] = True

    def check(self, config: TrainConfig) -> None:
        for name, value in (("domains", config.teacher.domains), ("ema", config.teacher.ema)):
            if value:
                raise UserError(
                    f"teacher.{name}",
                    value,
                    "a cache is scored by one teacher that stays as it is",
                    "remove it",
                )

    @property
    def follows_sampled_tokens(self) -> bool:
        return True


class Lightning(Objective[LightningObjective]):
    """``L = -1/N sum_t A_t log q(y_t)`` over all response tokens, q the student as it is now, no importance weights."""

    @property
    def uses_trainer_entropy(self) -> bool:
        return True  # the cached ones are the initial student's

    def needs_token_stats(self, step: int) -> bool:
        return True  # log q of the student as it is now

    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        advantage, clip = log_ratio(table), self.config.advantage_clip
        metrics = {}
        if table.num_tokens:
            drift = table.require("rollout_logprob") - table.require("student_logprob")
            metrics["cache/drift"] = float(drift.double().mean())
        if clip is not None:
            if table.num_tokens:
                metrics["advantage/clipped"] = float((advantage.abs() > clip).double().mean())
            advantage = advantage.clamp(-clip, clip)
        return policy_gradient(table, advantage, float(table.num_tokens), metrics=metrics)
