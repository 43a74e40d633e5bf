"""Every objective trains the quick start's pair, with the same numbers at TP2, PP2 and DP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from sead_megatron.objectives import OBJECTIVES
from tests.distributed.launch import run_ranks

LAYOUTS = [
    {"student": [2, 1, True], "teacher": [1, 2]},
    {"student": [1, 2], "teacher": [2, 1]},
    {"student": [1, 1], "teacher": [2, 1]},
]


def test_results_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """One update with each objective, all on one student: what one of them leaves is where the next one starts."""
    names = sorted(OBJECTIVES)
    first, *others = run_ranks("objectives", 2, tmp_path, layouts=LAYOUTS, names=names)
    for name in names:
        assert first[name]["active"] > 0 and first[name]["grad_norm"] > 1e-4, (name, first[name])
        for other in others:
            assert other[name]["active"] == first[name]["active"], name
            for key in ("loss", "grad_norm"):
                assert other[name][key] == pytest.approx(first[name][key], rel=1e-5, abs=1e-7), (name, key)
