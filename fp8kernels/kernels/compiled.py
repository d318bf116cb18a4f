"""Loading a compiled module, or saying why it is absent."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch  # noqa: F401  first, so that the compiled module shares its OpenMP threads

# CUDA kernels run on the host, on CPU tensors and slowly: for tests, in a build with FP8KERNELS_BUILD_TESTS=ON
EMULATED = os.environ.get("FP8KERNELS_EMULATE") == "1"


def load(name: str, hint: str = "") -> tuple[Any, str]:
    """The module fp8kernels.<name> and ""; or None and the reason, in words, that it does not load."""
    if EMULATED and name == "_cuda":
        name = "_cuda_emulated"
    try:
        return importlib.import_module(f"fp8kernels.{name}"), ""
    except ImportError as error:
        return None, f"the compiled module fp8kernels.{name} does not load{hint}: {error}"
