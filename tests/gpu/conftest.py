"""After every test the GPU is waited for and its memory given back; a fault on it takes the process along."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

WORKER = "PYTEST_XDIST_WORKER"  # set in the processes of pytest-xdist


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """So that a fault is that of the test it came up in.

    After one, nothing more runs on the GPU in this process: under pytest-xdist it ends, the test counts as failed, and
    a new process takes the tests that are left.
    """
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if WORKER in os.environ:
                os._exit(1)
            raise
        torch.cuda.empty_cache()
