"""copy: the do-nothing verb; what is left of memory speed after a call through every layer of the library."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .case import BANDWIDTH, Case, Shape, assert_same, kernel, text

FULL, SMALL = (8192, 8192), (512, 1024)


def versus_torch(shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's clone."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    run = kernel("copy", backend, x)
    return Case(
        "copy", "copy bf16", "-", backend, text(shape), "torch clone",
        lambda: run(x), x.clone, lambda: assert_same(run(x), x, "copy"), (f"copy/{backend}",),
        unit=BANDWIDTH, moved=2 * x.nbytes, baseline_moved=2 * x.nbytes,
    )  # fmt: skip


def test_copy(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_torch(shape, backend))
