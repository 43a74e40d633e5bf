"""A response cache of made-up numbers, for tests that read one without having sampled it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sead_megatron.config import TrainConfig
from sead_megatron.data.prompts import read_prompts
from sead_megatron.data.response_cache import TOKEN_COLUMNS, CacheWriter, cache_writer, scoring_config


def rows_of(
    numbers: range, ids: Sequence[str], prompt_ids: Sequence[int], samples: int
) -> list[dict[str, Any]]:
    """Ragged responses, the first of which is empty; every number tells its prompt, sample and position."""
    rows = []
    for i in numbers:
        for sample in range(samples):
            tokens = np.arange((i + sample) % 4)
            values = {
                column: (-1000 * n - 100 * i - 10 * sample - tokens).astype(np.float32)
                for n, column in enumerate(TOKEN_COLUMNS)
            }
            rows.append(
                {
                    "id": ids[i],
                    "sample": sample,
                    "prompt_ids": np.asarray(prompt_ids, dtype=np.int32),
                    "response_ids": (3 + tokens).astype(np.int32),
                    "finished": i % 2 == 0,
                    **values,
                }
            )
    return rows


def write_cache(
    config: TrainConfig, parts: Sequence[int] | None = None, prompt_ids: Sequence[int] = (1, 3, 4, 5, 6)
) -> CacheWriter:
    """Writes `data.cache` of a configuration whose prompts all have these tokens, or some of its parts."""
    writer = cache_writer(scoring_config(config))
    ids = [record.id for record in read_prompts(Path(config.data.prompts))]
    writer.start()
    for part in range(writer.num_parts) if parts is None else parts:
        rows = rows_of(writer.prompts_of(part), ids, prompt_ids, config.rollout.samples_per_prompt)
        writer.write(part, rows)
    return writer
