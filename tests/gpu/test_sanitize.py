"""What compute-sanitizer watches on a GPU runs here on the kernels of the CPU, and reaches every verb."""

from __future__ import annotations

import pytest
from gpu.lines import CPU, Line
from gpu.sanitize import watch

from fp8kernels.ops.table import TABLE


@pytest.mark.parametrize("verb", TABLE)
def test_every_verb_is_reached(verb: str) -> None:
    kernel = next(kernel for kernel in TABLE[verb] if kernel.name in ("cpu", "reference"))
    assert watch(Line(verb, kernel, CPU)) >= 1
