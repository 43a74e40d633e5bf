"""Cached responses as the rollouts of a step: no engine and no teacher are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sead_megatron.config import TrainConfig
from sead_megatron.data.response_cache import COMMAND, TOKEN_COLUMNS, read_cache
from sead_megatron.data.types import Prompt, Rollout
from sead_megatron.errors import UserError


class CachedResponses:
    """The cache of a run, for its training prompts."""

    def __init__(self, config: TrainConfig, prompts: Sequence[Prompt]) -> None:
        """Raises UserError as `read_cache`, and for a prompt that has other tokens than those that were answered."""
        self._table, self._first = read_cache(config, prompts)
        self._samples = config.rollout.samples_per_prompt
        asked = self._table.column("prompt_ids")
        for prompt, row in zip(prompts, self._first, strict=True):
            if not np.array_equal(asked[row].values.to_numpy(), prompt.token_ids):
                raise UserError(
                    "data.cache",
                    config.data.cache,
                    f"has responses to another text of prompt {prompt.id!r}",
                    f"make another with `{COMMAND} CONFIG`, or restore data.prompts",
                )

    def rollouts(self, batch: Sequence[int]) -> list[Rollout]:
        """All responses to some prompts, given by their indices in the training prompts."""
        return [
            self._rollout(prompt, self._first[prompt] + sample)
            for prompt in batch
            for sample in range(self._samples)
        ]

    def _rollout(self, prompt: int, row: int) -> Rollout:
        def array(name: str) -> np.ndarray:
            # A copy: the file is mapped for reading only.
            return np.array(self._table.column(name)[row].values)

        return Rollout(
            prompt_index=prompt,
            prompt_ids=array("prompt_ids"),
            response_ids=array("response_ids"),
            finished=self._table.column("finished")[row].as_py(),
            weight_version=0,
            **{name: array(name) for name in TOKEN_COLUMNS},
        )
