"""Every line of the table passes the cases that a GPU is asked before its kernels are used."""

from __future__ import annotations

import pytest
import torch
from gpu.lines import Line, lines

from fp8kernels.ops import proof
from fp8kernels.ops.table import TABLE


@pytest.mark.parametrize("line", [line for verb in TABLE for line in lines(verb)])
def test_the_line_passes(line: Line) -> None:
    assert proof.compare(line.verb, line.kernel, TABLE[line.verb][-1], torch.device(line.device)) is None
