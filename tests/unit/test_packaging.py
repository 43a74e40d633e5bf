"""A wheel holds what the checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("sead_megatron/**/__init__.py")
    }
    assert {name for name in setuptools["packages"] if name.startswith("sead_megatron")} == found


def test_data_files_are_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["sead_megatron"]
    listed = {path for pattern in patterns for path in (ROOT / "sead_megatron").glob(pattern)}
    assert {path for path in (ROOT / "sead_megatron/presets").iterdir()} <= listed
