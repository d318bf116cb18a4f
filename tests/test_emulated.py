"""The tests that a machine with a GPU runs, over the CUDA kernels on the host: bindings, launchers, tiles, edges."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAST = 30  # tests that run; a table that lost its lines would pass by having none


def test_gpu_tests_on_the_host() -> None:
    if importlib.util.find_spec("fp8kernels._cuda_emulated") is None:
        pytest.skip("built without the C++ tests")
    chosen = ["tests/gpu", "-m", "not gpu and not slow", "-k", "(cuda or stream) and not 64_bits"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *chosen],  # -s: the emulator's own words
        env={**os.environ, "FP8KERNELS_EMULATE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= LEAST, run.stdout[-400:]
