"""commit: the histories of a whole model rolled and turned into scales, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8kernels.kernels.commit import ScaleRule, State

from .case import Case, Shape, assert_same, kernel, reference, text

FULL, SMALL = (224, 3, 64), (16, 3, 64)  # layers (7 in each of 32 blocks), tensors of a layer, window


def versus_reference(shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against the reference, a loop of torch calls over the layers."""
    rule = ScaleRule()
    ours, theirs = states(shape), states(shape)
    run = kernel("commit", backend, ours, rule)

    def check() -> None:
        mine, expected = states(shape), states(shape)
        run(mine, rule)
        reference("commit")(expected, rule)
        for a, b in zip(mine, expected, strict=True):
            for name in ("history", "pending", "scale"):
                assert_same(getattr(a, name), getattr(b, name), f"commit {name}")

    def step(given: list[State], commit: Callable[..., None]) -> Callable[[], None]:
        def work() -> None:
            for state in given:
                state.pending.fill_(1.0)
            commit(given, rule)

        return work

    return Case(
        "commit", "commit max", "-", backend, text(shape), "the reference, in torch",
        step(ours, run), step(theirs, reference("commit")), check, (f"commit/{backend}",),
    )  # fmt: skip


def states(shape: Shape) -> list[State]:
    layers, tensors, window = shape
    random = torch.Generator().manual_seed(8)
    return [
        State(
            torch.rand(tensors, window, generator=random),
            torch.rand(tensors, generator=random),
            torch.rand(tensors, generator=random),
            torch.full((tensors,), 15.0),
        )
        for _ in range(layers)
    ]


def test_commit(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_reference(shape, backend))
