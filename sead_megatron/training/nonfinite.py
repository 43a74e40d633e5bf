"""Which frozen model to blame for numbers that are not finite, before the student is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sead_megatron.config import TrainConfig
from sead_megatron.data.types import Prompt, TokenTable
from sead_megatron.training.device_rows import to_device
from sead_megatron.training.step_plan import StepPlan
from sead_megatron.training.teacher import TeacherScores
from sead_megatron.training.teachers import Scores

_OF_TEACHERS = ("teacher_entropy", "teacher_logprob")
_OF_REFERENCE = ("reference_logprob",)


@dataclass(frozen=True)
class Blame:
    """Response tokens of the global batch at which frozen models gave a NaN or an infinity, and what to say of it."""

    tokens: int
    message: str


@dataclass(frozen=True, eq=False)
class FrozenModels:
    """The frozen models of a run, as they are called in messages, and the prompt set."""

    teachers: Sequence[str]
    reference: str | None
    prompts: Sequence[Prompt]

    @classmethod
    def of(cls, config: TrainConfig, prompts: Sequence[Prompt]) -> FrozenModels:
        """Those that the configuration loads."""
        teachers = [f"the {config.teacher.owner_of(field)} {path}" for path, field in config.teachers.items()]
        reference = None if config.reference is None else f"the reference model {config.reference.path}"
        return cls(teachers, reference, prompts)

    def blame_for_scores(
        self, plan: StepPlan, scores: Scores | None, table: TokenTable, device: torch.device
    ) -> Blame | None:
        """None where hidden states, and the statistics in `table`, are finite (a collective over the world).

        Reads every hidden state once, and back from the device two numbers.
        """
        masks = {}
        if self.teachers:
            parts = [] if scores is None else scores.parts
            masks["hidden states"] = nonfinite_hidden(parts, plan.num_tokens, device)
        columns = {name: getattr(table, name) for name in (*_OF_TEACHERS, *_OF_REFERENCE)}
        return self._blame(
            plan, masks | self._statistics({name: c for name, c in columns.items() if c is not None})
        )

    def blame_for_columns(self, plan: StepPlan, columns: Mapping[str, Tensor]) -> Blame | None:
        """None where the statistics that an update measured are finite, as far as they are a frozen model's alone."""
        return self._blame(plan, self._statistics(columns))

    def _statistics(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {"statistics": _OF_TEACHERS if self.teachers else (), "reference": _OF_REFERENCE}
        return {
            what: ~torch.stack([columns[name].isfinite() for name in names if name in columns]).all(0)
            for what, names in known.items()
            if any(name in columns for name in names)
        }

    def _blame(self, plan: StepPlan, masks: Mapping[str, Tensor]) -> Blame | None:
        """`masks`: what was looked at -> bool [N], which tokens are bad. The first with any is what is told."""
        if not masks:
            return None
        counts = torch.stack([mask.sum() for mask in masks.values()]).tolist()
        for count, (what, mask) in zip(counts, masks.items(), strict=True):
            if count:
                return Blame(count, "; ".join(self._sentences(plan, what, mask.nonzero()[:, 0].cpu())))
        return None

    def _sentences(self, plan: StepPlan, what: str, tokens: Tensor) -> list[str]:
        """One for each model, of the bad tokens' indices in the TokenTable."""
        rollouts = (torch.searchsorted(plan.offsets, tokens, right=True) - 1).tolist()
        by_model: dict[str, list[int]] = {}
        for rollout in rollouts:
            name = str(self.reference) if what == "reference" else self.teachers[plan.teacher_of[rollout]]
            by_model.setdefault(name, []).append(rollout)
        said = "logprobs" if what == "reference" else what
        return [
            f"{name} gave non-finite {said} for {len(found)} of {plan.num_tokens} response tokens, first in the "
            f"response to prompt {self.prompts[plan.rollouts[found[0]].prompt_index].id!r}"
            for name, found in by_model.items()
        ]


def nonfinite_hidden(parts: Sequence[TeacherScores], num_tokens: int, device: torch.device) -> Tensor:
    """bool [num_tokens]: tokens of whose hidden state some rank holds a NaN or an infinity; equal on all ranks.

    `parts`: what this rank holds of teachers. A collective over the world.
    """
    found = torch.zeros(num_tokens, dtype=torch.uint8, device=device)
    for part in parts:
        # A sum is finite where all of its terms are: one pass, and no mask as large as the hidden states.
        bad = ~part.hidden.sum(1, dtype=torch.float32).isfinite()
        found[to_device(part.token_index, device)] = bad.to(device, torch.uint8)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.bool()
