"""Fused modules with a GPU's kernels: Triton's in its interpreter, NVIDIA's on the host, each in its own process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# that fused and unfused agree to the bit holds for kernels that sum rows in torch's own order only
CHOSEN = "kernels_are_those or backward or without_eps or keeps_inputs"


@pytest.mark.parametrize("variable", ["TRITON_INTERPRET", "FP8KERNELS_EMULATE"])
def test_modules_with_the_kernels_of_a_gpu(variable: str) -> None:
    if variable == "TRITON_INTERPRET":
        pytest.importorskip("triton", reason="triton is not installed")
    elif importlib.util.find_spec("fp8kernels._cuda_emulated") is None:
        pytest.skip("built without the C++ tests")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nn/test_fused.py", "-k", CHOSEN],
        env={**os.environ, variable: "1", "PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-500:]
