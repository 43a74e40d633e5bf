"""A wheel holds what the checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_is_in_a_listed_package() -> None:
    """Python files of listed packages come by themselves, others by a pattern of their package."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [path for path in ROOT.glob("sead_megatron/**/*") if path.is_file() and path.suffix != ".pyc"]
    listed = {name for name in setuptools["packages"] if name.startswith("sead_megatron")}
    assert listed == {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    data = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert {path for path in files if path.suffix != ".py"} <= data
