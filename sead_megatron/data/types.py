"""What travels between rollout, scoring, objective and update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sead_megatron.data.terms import Divergence, Term


@dataclass(frozen=True)
class FixedResponse:
    """A response of the data: tokens, whether it is whole, and which tokens are the assistant's, where not all are."""

    ids: tuple[int, ...]
    finished: bool
    trained: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """One training or evaluation prompt; ``token_ids`` is the rendered chat up to the response.

    ``teacher_token_ids`` is what the teacher reads in its place, where that is something else (`teacher.context`).
    ``fixed_response`` is a response of the data, where some batches train on them.

    Raises ValueError when it has no token: nothing could predict the first response token.
    """

    id: str
    messages: list[dict[str, str]]
    answer: str | None
    domain: str | None
    token_ids: tuple[int, ...]
    teacher_token_ids: tuple[int, ...] | None = None
    fixed_response: FixedResponse | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no tokens")


FIXED_RESPONSE = -1
"""``Rollout.weight_version`` of a response that no student sampled."""

# Arrays of a rollout with an entry a response token, and their columns of the token table.
_OF_TOKENS = {
    "logprobs": "rollout_logprob",
    "entropies": "student_entropy",
    "sampling_logprobs": "sampling_logprob",
    "teacher_logprobs": "teacher_logprob",
}


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response, sampled or fixed (shapes: P prompt tokens, R response tokens; R may be 0).

    Attributes:
        prompt_index: index into the prompt set.
        prompt_ids: int32 [P], P >= 1.
        response_ids: int32 [R], the stop token included.
        logprobs: float32 [R], log probability of each sampled token at the loss' temperature, in nats; None where
            nothing was sampled.
        entropies: float32 [R], the student's full-vocabulary entropy at the loss' temperature, in nats, or None.
        finished: False when the response was cut by ``max_new_tokens``.
        weight_version: version of the student weights that sampled it, ``FIXED_RESPONSE`` for a response of the data.
        sampling_logprobs: float32 [R], log probability of each sampled token at the sampling temperature (before top-p
            and top-k), or None where it is not known.
        teacher_prompt_ids: int32 [P'], the prompt that the teacher reads, or None where it is ``prompt_ids``.
        teacher_logprobs: float32 [R], cached log probabilities that the teacher gives the tokens, or None.
        trained: bool [R], False for tokens of other speakers in a fixed response of several turns; None for all.

    Raises ValueError for another dtype or shape.
    """

    prompt_index: int
    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32] | None
    entropies: npt.NDArray[np.float32] | None
    finished: bool
    weight_version: int
    sampling_logprobs: npt.NDArray[np.float32] | None = None
    teacher_prompt_ids: npt.NDArray[np.int32] | None = None
    teacher_logprobs: npt.NDArray[np.float32] | None = None
    trained: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        expected = {
            "prompt_ids": np.int32,
            "response_ids": np.int32,
            "logprobs": np.float32,
            "entropies": np.float32,
            "sampling_logprobs": np.float32,
            "teacher_prompt_ids": np.int32,
            "teacher_logprobs": np.float32,
            "trained": np.bool_,
        }
        for name, dtype in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(
                    f"rollout {name} must be a 1-D {np.dtype(dtype)} array, got {array.dtype} {array.shape}"
                )
        if not len(self.prompt_ids):
            raise ValueError(f"rollout of prompt {self.prompt_index} has an empty prompt")
        for name in (*_OF_TOKENS, "trained"):
            array = getattr(self, name)
            if array is not None and len(array) != len(self.response_ids):
                raise ValueError(
                    f"rollout of prompt {self.prompt_index} has {len(self.response_ids)} response tokens and "
                    f"{len(array)} {name}"
                )

    @property
    def length(self) -> int:
        """Tokens of prompt and response together, P + R."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def trained_positions(self) -> npt.NDArray[np.int64]:
        """Indices [n] of the response tokens that have a row of the TokenTable."""
        if self.trained is None:
            return np.arange(len(self.response_ids))
        return np.flatnonzero(self.trained)

    @property
    def trained_ids(self) -> npt.NDArray[np.int32]:
        """Those tokens, int32 [n]."""
        return self.response_ids[self.trained_positions]

    def as_read_by_teacher(self) -> Rollout:
        """The same response behind the teacher's prompt."""
        if self.teacher_prompt_ids is None:
            return self
        return replace(self, prompt_ids=self.teacher_prompt_ids, teacher_prompt_ids=None)


@dataclass(frozen=True, eq=False)
class RolloutFacts:
    """What is known of each of the S rollouts of the global batch as a whole; tensors on the CPU.

    Attributes:
        group: int64 [S], rollouts of one prompt have the same number; consecutive, from 0.
        reward: float32 [S], 1 for the right final answer and 0 for another; NaN without a gold answer.
        finished: bool [S], False where the response was cut.
        longest: the longest response that was allowed, tokens.
        difficulty: float32 [S], 1 - pass rate of the prompt, or None without difficulties.
        domains: the prompts' domains.

    Raises ValueError for another dtype or shape.
    """

    group: Tensor
    reward: Tensor
    finished: Tensor
    longest: int
    difficulty: Tensor | None = None
    domains: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        wanted = {
            "group": torch.int64,
            "reward": torch.float32,
            "finished": torch.bool,
            "difficulty": torch.float32,
        }
        for name, dtype in wanted.items():
            column = getattr(self, name)
            if column is not None and (column.dtype != dtype or column.shape != self.group.shape):
                actual = f"{column.dtype} {tuple(column.shape)}"
                raise ValueError(f"{name} must be {dtype} {list(self.group.shape)}, got {actual}")


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Statistics of the N response tokens of the global batch that are trained on, in rollout order, then by position.

    Every rank of the world holds the same table, so that whatever is decided from it is the same everywhere.
    ``offsets`` is int64 [S+1] on the CPU (host code slices by it): rollout i owns tokens
    ``offsets[i]:offsets[i+1]``. Every other column is float32 [N], detached, in nats, at the loss' temperature,
    or None when it was not measured. Where ``teacher_entropy`` is that of a top-k, the exact one is larger by at
    most ``teacher_entropy_slack``. ``rollout_logprob`` is the engine's, ``student_logprob`` the trainer's, of
    the sampled token; ``sampling_logprob`` is the engine's at the sampling temperature, ``reference_logprob`` that of
    a frozen third model. ``topk_*`` compare the models' k likeliest tokens: share of common ones, the student's mass on
    the teacher's, the teacher's on the student's, and by how much the teacher tells the student's apart (nats);
    ``gap_head`` and ``gap_tail`` are ``sum_v |p_v - q_v|`` over the tokens that hold half of the teacher's probability
    and over the others. ``argmax_*`` are both models' logprobs of the teacher's likeliest token. ``rollouts`` tells
    what is known of whole rollouts. KL directions: ``forward_kl`` = KL(teacher || student), ``reverse_kl`` =
    KL(student || teacher).

    Raises ValueError for a wrong dtype, shape or device, or for a column that requires grad.
    """

    offsets: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_entropy_slack: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    sampling_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    topk_overlap: Tensor | None = None
    topk_student_mass: Tensor | None = None
    topk_teacher_mass: Tensor | None = None
    topk_margin: Tensor | None = None
    gap_head: Tensor | None = None
    gap_tail: Tensor | None = None
    argmax_student_logprob: Tensor | None = None
    argmax_teacher_logprob: Tensor | None = None
    rollouts: RolloutFacts | None = None

    def __post_init__(self) -> None:
        offsets = self.offsets
        on_cpu = offsets.device.type == "cpu"
        if offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(offsets) or not on_cpu:
            shape = tuple(offsets.shape)
            raise ValueError(f"offsets must be int64 [S+1] on the CPU, got {offsets.dtype} {shape}")
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must start at 0 and never decrease, got {offsets.tolist()[:8]}...")
        device = self.device
        for name in self.column_names():
            column: Tensor | None = getattr(self, name)
            if column is None:
                continue
            if column.dtype != torch.float32 or tuple(column.shape) != (self.num_tokens,):
                actual = f"{column.dtype} {tuple(column.shape)}"
                raise ValueError(f"column {name} must be float32 [{self.num_tokens}], got {actual}")
            if column.device != device:
                raise ValueError(f"column {name} is on {column.device}, another column is on {device}")
            if column.requires_grad:
                raise ValueError(f"column {name} requires grad; statistics are detached")

    @classmethod
    def column_names(cls) -> tuple[str, ...]:
        """Names of the statistic columns, without ``offsets`` and ``rollouts``."""
        return tuple(f.name for f in fields(cls) if f.name not in ("offsets", "rollouts"))

    @classmethod
    def from_rollouts(
        cls, rollouts: Sequence[Rollout], device: torch.device | str, facts: RolloutFacts | None = None
    ) -> TokenTable:
        """The global batch with what the engine measured, or a cache holds: the columns that every rollout has."""
        lengths = torch.tensor([0] + [len(r.trained_positions) for r in rollouts], dtype=torch.int64)
        empty = np.empty(0, dtype=np.float32)
        columns = {}
        for name, column in _OF_TOKENS.items():
            arrays = [array for r in rollouts if (array := getattr(r, name)) is not None]
            if len(arrays) == len(rollouts):
                rows = (a[r.trained_positions] for a, r in zip(arrays, rollouts, strict=True))
                columns[column] = torch.from_numpy(np.concatenate([empty, *rows])).to(device)
        return cls(offsets=lengths.cumsum(0), rollouts=facts, **columns)

    @property
    def num_rollouts(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def device(self) -> torch.device:
        """Device of the columns; the CPU when no column is there."""
        columns = (getattr(self, name) for name in self.column_names())
        return next((column.device for column in columns if column is not None), torch.device("cpu"))

    def rollout_slice(self, rollout: int) -> slice:
        """The range of tokens of one rollout. Raises IndexError when there is no such rollout."""
        if not 0 <= rollout < self.num_rollouts:
            raise IndexError(f"rollout {rollout} of {self.num_rollouts}")
        return slice(int(self.offsets[rollout]), int(self.offsets[rollout + 1]))

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each rollout, int64 [S] on the CPU."""
        return self.offsets.diff()

    def every_token(self) -> Tensor:
        """bool [N], all true."""
        return torch.ones(self.num_tokens, dtype=torch.bool, device=self.device)

    def rollout_of_token(self) -> Tensor:
        """The rollout of each token, int64 [N], on the columns' device."""
        numbers = torch.arange(self.num_rollouts).repeat_interleave(self.lengths)
        return numbers.to(self.device)

    def position(self) -> Tensor:
        """Index of each token within its response, int64 [N], on the columns' device."""
        starts = self.offsets[:-1].repeat_interleave(self.lengths)
        return (torch.arange(self.num_tokens) - starts).to(self.device)

    def of_tokens(self, values: Tensor) -> Tensor:
        """A value of each rollout [S], repeated for its tokens: [N] on the columns' device."""
        return values.repeat_interleave(self.lengths.to(values.device)).to(self.device)

    def rollout_sum(self, column: Tensor) -> Tensor:
        """Sum of a column over the tokens of each rollout, float64 [S] on the CPU."""
        sums = torch.zeros(self.num_rollouts, dtype=torch.float64)
        return sums.index_add_(0, self.rollout_of_token().cpu(), column.detach().double().cpu())

    def rollout_mean(self, column: Tensor) -> Tensor:
        """Mean over the tokens of each rollout, float64 [S] on the CPU; 0 for a rollout without a token."""
        return self.rollout_sum(column) / self.lengths.clamp_min(1)

    @property
    def policy_logprob(self) -> Tensor:
        """Student's logprob of the sampled tokens: the trainer's where it was measured, else the engine's."""
        return self.student_logprob if self.student_logprob is not None else self.require("rollout_logprob")

    def facts(self) -> RolloutFacts:
        """``rollouts``, or ValueError when nothing is known of them."""
        if self.rollouts is None:
            raise ValueError("the token table has no facts about its rollouts (rewards, groups)")
        return self.rollouts

    def require(self, name: str) -> Tensor:
        """The column, or ValueError when it was not measured."""
        column: Tensor | None = getattr(self, name)
        if column is None:
            raise ValueError(f"the token table has no {name}: it must be measured before the coefficients")
        return column

    def with_columns(self, **columns: Tensor) -> TokenTable:
        """A table with these columns replaced. Raises ValueError for a name that is no column."""
        unknown = sorted(set(columns) - set(self.column_names()))
        if unknown:
            raise ValueError(f"no such columns: {unknown}; there are {list(self.column_names())}")
        return replace(self, **columns)  # type: ignore[arg-type]  # the names are those of columns


def empty_weights(table: TokenTable) -> Tensor:
    """Zeros float32 [N, 4] on the device of the table's columns."""
    return torch.zeros(table.num_tokens, len(Term), dtype=torch.float32, device=table.device)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What an objective asks of the kernel: ``loss = sum_t weights[t] . (FKL, RKL, H_student, log p_y) /
    normalizer``.

    Attributes:
        weights: float32 [N, 4], columns in the order of ``Term``. An all-zero row is dropped from the update.
        normalizer: > 0, over the global batch, so that the loss does not depend on how the batch is split.
        divergence: what the first two columns weigh in place of the KL divergences over the whole vocabulary, or None.
        teacher_argmax: whether y is the teacher's likeliest token in place of the sampled one.
        zones: int8 [N] of ``Zone`` values, or None for an objective without zones.
        metrics: what the objective wants logged for this step.

    Raises ValueError for a wrong dtype or shape, weights that require grad, or a normalizer that cannot
    divide.
    """

    weights: Tensor
    normalizer: float
    divergence: Divergence | None = None
    teacher_argmax: bool = False
    zones: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights, zones = self.weights, self.zones
        if weights.dtype != torch.float32 or weights.ndim != 2 or weights.shape[1] != len(Term):
            raise ValueError(
                f"weights must be float32 [N, {len(Term)}], got {weights.dtype} {tuple(weights.shape)}"
            )
        if weights.requires_grad:
            raise ValueError("weights require grad; coefficients are detached")
        if not (math.isfinite(self.normalizer) and self.normalizer > 0):
            raise ValueError(f"normalizer must be finite and positive, got {self.normalizer}")
        if zones is not None and (zones.dtype != torch.int8 or zones.shape != weights.shape[:1]):
            raise ValueError(f"zones must be int8 [{len(weights)}], got {zones.dtype} {tuple(zones.shape)}")
