"""The Triton kernels in the interpreter: every file here that is named in_interpreter_*, each in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("in_interpreter_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("in_interpreter_"))
def test_in_the_interpreter(path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(  # TRITON_INTERPRET has to be set before triton is imported
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-500:]


def test_each_verb_has_a_file() -> None:
    names = {path.stem.removeprefix("in_interpreter_") for path in FILES}
    assert names >= {"quantize", "dequantize", "producers", "gemm"}
