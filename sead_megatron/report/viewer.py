"""The sampled rollouts as the page's token viewer reads them, within a budget of tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from sead_megatron.report.loading import COLUMNS, Run, SampledRollout, within

TOKEN_BUDGET = 20_000
"""Tokens embedded in a page, about 65 bytes each."""
ROLLOUT_TOKENS = 1_500
"""Tokens of a rollout that are shown; the rest is counted."""
_NAMES = {"\t": "⇥", "\r": "␍", " ": "␣"}


def viewer_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One entry a run: name, and evenly spaced steps (the first and the last among them) with their rollouts."""
    budget = TOKEN_BUDGET // max(1, len(runs))
    return [
        {"name": run.name, "steps": _steps(run, budget), "onDisk": len(run.rollout_steps)} for run in runs
    ]


def _steps(run: Run, budget: int) -> list[dict[str, Any]]:
    steps = sorted(run.rollouts)
    size = {step: sum(min(len(r.tokens), ROLLOUT_TOKENS) for r in run.rollouts[step]) for step in steps}
    return [_step(run.rollouts[step], step) for step in within(steps, lambda step: size[step], budget)]


def _step(rollouts: Sequence[SampledRollout], step: int) -> dict[str, Any]:
    return {"step": step, "scale": _scale(rollouts), "rollouts": [_rollout(rollout) for rollout in rollouts]}


def _scale(rollouts: Sequence[SampledRollout]) -> float | None:
    """The forward KL that gets the full opacity: the 99th percentile over the step's tokens."""
    known = [value for rollout in rollouts for value in rollout.forward_kl or [] if value is not None]
    return max(float(np.percentile(known, 99)), 1e-6) if known else None


def _rollout(rollout: SampledRollout) -> dict[str, Any]:
    shown = slice(ROLLOUT_TOKENS)
    entry: dict[str, Any] = {
        "id": rollout.prompt_id,
        "prompt": [[message.get("role", ""), message.get("content", "")] for message in rollout.prompt],
        "answer": rollout.answer,
        "reward": rollout.reward,
        "finished": rollout.finished,
        "length": len(rollout.tokens),
        "ids": rollout.tokens[shown],
        "texts": [readable(text) for text in rollout.token_texts[shown]],
        "zones": None if rollout.zones is None else rollout.zones[shown],
    }
    for name in COLUMNS:
        column = getattr(rollout, name)
        entry[name] = None if column is None else [_short(value) for value in column[shown]]
    return entry


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def readable(text: str) -> str:
    """The text with what a page would not show made visible: ends of lines, tabs, control and format characters.

    A newline keeps itself behind its sign, so that the text breaks where the response does. A token that is one space
    gets a sign; spaces inside a token stay. An empty text (a special token) stays empty: the page shows its id.
    """
    if text == " ":
        return _NAMES[text]
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    if letter == "\n":
        return "↵\n"
    if letter in "\t\r":
        return _NAMES[letter]
    # Control, format (bidirectional overrides among them), surrogates and private use.
    return f"⟨U+{ord(letter):04X}⟩" if unicodedata.category(letter)[0] == "C" else letter
