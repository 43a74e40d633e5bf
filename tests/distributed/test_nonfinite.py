"""A NaN on one rank skips the step on all of them, and too many end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.launch import run_ranks
from tests.tiny_models import save_tiny_llama

CASES: list[dict[str, Any]] = [
    {"student": [1, 1], "teacher": [2, 1], "victim": 1},
    {"student": [1, 1], "teacher": [1, 1], "victim": 0, "distributed": False, "dtype": "bfloat16"},
    {"student": [2, 1], "teacher": [1, 2], "victim": 1},
    {"student": [1, 2], "teacher": [1, 1], "victim": 1},
    {"student": [1, 1], "teacher": [2, 1], "victim": 0, "poisoned": "output"},
]


def test_a_nan_on_one_rank_skips_the_step_everywhere(tmp_path: Path) -> None:
    """A teacher's hidden state is NaN for one token on one rank of DP2, TP2 or PP2.

    No rank may apply the step: weights and optimizer state stay bit for bit, the step counts as skipped, and the
    next finite step equals the one that would have come. With max_skipped_steps 1 a second one in a row raises on
    every rank, naming loss and gradient norm, and the teacher as the cause: which, how many tokens, the first's prompt.
    A NaN in its output layer, which a replica's every token meets, shows in the statistics.
    """
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "initializer_range": 0.1,
    }
    student = save_tiny_llama(tmp_path / "student", seed=1, **small)
    teacher = save_tiny_llama(tmp_path / "teacher", seed=2, initializer_range=0.1)
    reports = run_ranks("nonfinite", 2, tmp_path, student=str(student), teacher=str(teacher), cases=CASES)
    applied, skipped = [True, False], [False, True]
    for case, report in zip(CASES, reports, strict=True):
        never, once, twice = (report[name] for name in ("never", "once", "twice"))
        assert never["applied"] == [applied] * 3 and never["unchanged"] == [False] * 3, case
        assert once["applied"] == [applied, skipped, applied], case
        assert once["unchanged"] == [False, True, False] and once["counted"] == [0, 1, 1], case
        assert once["loss"][1] != once["loss"][1] and once["error"] == "", case
        assert once["loss"][2] == never["loss"][1], case
        assert twice["applied"] == [applied, skipped, skipped] and twice["counted"] == [0, 1, 2], case
        assert twice["error"].startswith("2 steps in a row had a non-finite loss or gradient (loss nan, "), (
            case
        )
        assert "gradient norm" in twice["error"], case
        output_layer = case.get("poisoned") == "output"
        cause = (
            f"the teacher {teacher} gave non-finite {'statistics' if output_layer else 'hidden states'} for "
        )
        assert never["blame"] == [None] * 3 and once["blame"][::2] == [None] * 2, case
        told = once["blame"][1]
        assert told.startswith(cause) and told.endswith(f"in the response to prompt {once['first']!r}"), case
        count = int(told.removeprefix(cause).split()[0])
        assert (1 < count < once["tokens"]) if output_layer else count == 1, case
        assert twice["error"].endswith(f"; the cause: {told}"), case
