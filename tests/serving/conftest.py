"""Models that are trained once for all tests of this folder: copy them (copy.deepcopy) before you change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving import common

from fp8kernels.export import export


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return common.tokenizer()


@pytest.fixture(scope="session")
def hif8() -> Any:
    """A converted, trained model: HiF8 weights and inputs, delayed scales; to read."""
    return common.trained("hif8-qat")


@pytest.fixture(scope="session")
def e4m3() -> Any:
    """The same in E4M3, delayed scales; to read."""
    return common.trained("e4m3-delayed")


@pytest.fixture(scope="session")
def e4m3_row() -> Any:
    """E4M3 with a scale for each row, from the tensor itself; to read."""
    return common.trained("e4m3-row")


@pytest.fixture(scope="session")
def e4m3_block() -> Any:
    """E4M3 with 1x128 and 128x128 blocks; to read."""
    return common.trained("e4m3-block128")


@pytest.fixture(scope="session")
def native_folder(hif8: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hif8` as export writes it, with high precision kept in fp32 so that results are equal; to read."""
    folder = tmp_path_factory.mktemp("native") / "model"
    export(hif8, folder, tokenizer=tokenizer, dtype=torch.float32)
    return folder


@pytest.fixture
def prompt_ids() -> torch.Tensor:
    return common.prompt_ids()
