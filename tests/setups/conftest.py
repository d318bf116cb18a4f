"""One thread: the models are so small that a second one only waits, most of all where other work has the cores."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(seeds: None) -> None:
    torch.set_num_threads(1)
