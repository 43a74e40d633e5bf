"""Tiny models that several tests convert."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_inputs import WORDS, write_tokenizer_json


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, and one with tied embeddings; not to be changed."""
    from tests.tiny_families import SAVE_TINY, save_tiny_qwen3

    path = tmp_path_factory.mktemp("families")
    saved = {name: save(path / name) for name, save in SAVE_TINY.items()}
    saved["tied"] = save_tiny_qwen3(path / "tied", tie_word_embeddings=True)
    for directory in saved.values():
        write_tokenizer_json(directory, WORDS)
    return saved


@pytest.fixture
def llama(families: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(families["llama"], tmp_path / "llama"))


@pytest.fixture
def converted(families: dict[str, Path], tmp_path: Path) -> Path:
    """The same model as a distributed checkpoint."""
    from tests.conversions import run

    run(families["llama"], tmp_path / "converted")
    return tmp_path / "converted"
