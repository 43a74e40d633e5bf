"""What an objective is: a section of the configuration, and how it turns token statistics into coefficients.

The trainer and the kernel know no method: zones, gates, advantages and schedules only change coefficients. An
objective knows no layout: it sees the same table on every rank and must compute the same coefficients from it.

Torch-free, like every file of an objective: the configuration is read before torch is loaded. Columns come as tensors
and are worked on with their own methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from sead_megatron.data.terms import Divergence, Term
from sead_megatron.section import PositiveFloat, Section, Share

if TYPE_CHECKING:
    from torch import Tensor

    from sead_megatron.config import TrainConfig
    from sead_megatron.data.types import Coefficients, TokenTable


class ObjectiveSection(Section):
    """What every objective can be told."""

    name: str
    """Which objective."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the loss. Rollouts are sampled at `rollout.temperature`."""

    # What must be there, beside the models, for the coefficients to be computed; checked before anything is loaded.
    needs_rewards: ClassVar[bool] = False
    """Every training prompt must have an `answer`."""
    needs_difficulty: ClassVar[bool] = False
    """`curriculum.difficulty` must name a file."""
    min_samples_per_prompt: ClassVar[int] = 1
    reads_cache: ClassVar[bool] = False
    """Trains on `data.cache`: nothing is sampled, and no teacher is loaded."""

    @property
    def own_batches(self) -> float:
        """Share of the batches that are rollouts; the others are fixed responses of the data."""
        return 1.0

    @property
    def follows_sampled_tokens(self) -> bool:
        """Whether the gradient is right only in expectation over tokens drawn from the distribution in the loss."""
        return False

    @property
    def corrects_sampling(self) -> bool:
        """Whether importance weights make up for tokens drawn from another distribution."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher must be configured; where not, there is none, in no pass and in no memory."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model must be configured."""
        return False

    @property
    def needs_solutions(self) -> bool:
        """Whether the teacher must be shown a gold solution (`teacher.context`)."""
        return False

    def check(self, config: TrainConfig) -> None:
        """Raises UserError where the section contradicts the rest of the configuration."""


class PolicyGradientSection(ObjectiveSection):
    """An objective on the log-probabilities of sampled tokens: ``-A log q(y)`` with a detached advantage A."""

    importance_clip: PositiveFloat | None = Field(default=None, examples=[5.0])
    """Weigh each token by q(y) / mu(y), at most this, where mu is what it was sampled from. Needed where
    `rollout.temperature` is not `objective.temperature`. Default: no weights."""

    @property
    def follows_sampled_tokens(self) -> bool:
        return True

    @property
    def corrects_sampling(self) -> bool:
        return self.importance_clip is not None


class MixtureSection(ObjectiveSection):
    """A divergence at given prefixes, whoever wrote them: it may train on fixed responses too."""

    student_share: Share = 1.0
    """Share of the batches that are the student's own rollouts (lambda of GKD, arXiv 2306.13649); in the others the
    response to each prompt is its `turns` or its `solution`, with the same divergence. A coin a batch decides, by seed
    and step. 0 samples nothing."""

    @property
    def own_batches(self) -> float:
        return self.student_share


Settings = TypeVar("Settings", bound=ObjectiveSection)


class Objective(ABC, Generic[Settings]):
    """Computes the coefficients of a run of ``total_steps`` updates. This one has no state and needs little."""

    def __init__(self, config: Settings, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps

    @property
    def needs_teacher_entropy(self) -> bool:
        """Whether ``coefficients`` reads ``teacher_entropy``."""
        return False

    @property
    def needs_teacher_logprob(self) -> bool:
        """Whether ``coefficients`` reads ``teacher_logprob``."""
        return False

    @property
    def uses_trainer_entropy(self) -> bool:
        """Whether ``student_entropy`` must be the trainer's own measurement instead of the engine's."""
        return False

    @property
    def teacher_topk(self) -> int:
        """How ``teacher_entropy`` is measured: over the k likeliest tokens and a tail bucket; 0 is exact."""
        return 0

    @property
    def topk_lists(self) -> int:
        """The k of the columns ``topk_*`` and ``gap_*``, which come with the statistics of every token; 0 for none."""
        return 0

    @property
    def teacher_argmax(self) -> bool:
        """Whether ``coefficients`` reads the columns ``argmax_*``, which come with the statistics of every token."""
        return False

    def needs_token_stats(self, step: int) -> bool:
        """Whether this step's coefficients need the trainer's statistics (entropies, KLs) of *every* token.

        They cost a forward-only pass of student and teacher heads before the update. Without it the table has
        the engine's student entropy and logprobs and, if asked for, the teacher's entropy and logprob.
        """
        return False

    def longest_response(self, step: int) -> int | None:
        """A limit of this step's responses below ``rollout.max_new_tokens``; None for no other limit."""
        return None

    @abstractmethod
    def coefficients(self, table: TokenTable, step: int) -> Coefficients:
        """Coefficients for update ``step`` (0 .. total_steps - 1), detached.

        Raises ValueError when the table lacks a column that the methods above ask for.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs; numbers, strings, None and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when ``state`` is not of this objective."""
        if state:
            raise ValueError(f"{self.config.name} has no state, got {sorted(state)}")


def coefficients_of(
    table: TokenTable,
    terms: Mapping[Term, Tensor | float],
    normalizer: float,
    *,
    divergence: Divergence | None = None,
    teacher_argmax: bool = False,
    zones: Tensor | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Coefficients:
    """Coefficients with the given columns, numbers or [N], and zeros in the others; a normaliser of 0 becomes 1.

    A weight that is not finite makes the loss so, and the step is skipped and counted.
    """
    from sead_megatron.data.types import Coefficients, empty_weights

    weights = empty_weights(table)
    for term, values in terms.items():
        weights[:, term] = values
    active = int((weights != 0).any(-1).sum())
    return Coefficients(
        weights=weights,
        normalizer=normalizer if normalizer > 0 else 1.0,
        divergence=divergence,
        teacher_argmax=teacher_argmax,
        zones=zones,
        metrics=token_metrics(table, active) | dict(metrics or {}),
    )


def token_metrics(table: TokenTable, active: int) -> dict[str, float]:
    """Counts, and means over all response tokens of the columns that are there.

    Means are in nats and taken in float64; a mean over no token is left out. ``active`` is the number of
    tokens that are trained on.
    """
    metrics = {"tokens/active": float(active), "tokens/response": float(table.num_tokens)}
    names = {
        "entropy/student": table.student_entropy,
        "entropy/teacher": table.teacher_entropy,
        "entropy/teacher_slack": table.teacher_entropy_slack,
        "kl/forward": table.forward_kl,
        "kl/reverse": table.reverse_kl,
        "topk/overlap": table.topk_overlap,
        "topk/student_mass": table.topk_student_mass,
        "topk/teacher_mass": table.topk_teacher_mass,
    }
    if table.num_tokens:
        metrics |= {
            name: float(column.double().mean()) for name, column in names.items() if column is not None
        }
    return metrics
