"""docs/objectives.md: its table names what there is, and its "add your own" does what it says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from sead_megatron.config.presets import preset_names
from sead_megatron.objectives import OBJECTIVES, build_objective

PAGE = (Path(__file__).parents[2] / "docs/objectives.md").read_text()


def test_the_table_has_every_objective_and_preset() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(OBJECTIVES)
    assert (
        sorted(preset for _, presets in rows for preset in re.findall(r"`(\w+)`", presets)) == preset_names()
    )


def test_add_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file, its registry line and its test, run as they stand there."""
    from sead_megatron.data.types import TokenTable

    source, line, test = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert not re.search(r"^\s*(import|from) torch", source, flags=re.MULTILINE)
    # A real module: pydantic looks names up in it.
    module = types.ModuleType("sead_megatron.objectives.hardest")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "hardest.py", "exec"), module.__dict__)
    monkeypatch.setattr("sead_megatron.objectives.OBJECTIVES", dict(OBJECTIVES))
    namespace = module.__dict__ | {
        "torch": torch,
        "TokenTable": TokenTable,
        "build_objective": build_objective,
        "OBJECTIVES": sys.modules["sead_megatron.objectives"].OBJECTIVES,
    }
    exec(line, namespace)
    exec(test, namespace)
    namespace["test_hardest"]()
    assert "hardest" not in OBJECTIVES
