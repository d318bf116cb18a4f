"""A tiny model's folder, made once, and a copy of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llm import common


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To read."""
    return common.model_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """To break."""
    return Path(shutil.copytree(plain, tmp_path / "model"))
