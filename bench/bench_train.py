"""One optimizer step of the demo's model: QAT against the same step in BF16."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import fp8kernels
from fp8kernels.models.llama import llama
from fp8kernels.training.demo.size import FULL as DEMO
from fp8kernels.training.demo.size import QUICK, DemoSize
from fp8kernels.training.step import adamw, train_step

from .case import TIME, Case

SETTLE = 3  # steps; the first ones allocate, and make the first scales
LOSS_TOLERANCE = 0.02  # of the loss after a few steps from the same weights, on the same batch
BATCHES = 8  # different ones, in turn
VERBS = ("quantize", "gemm", "dequantize", "commit")  # that a step calls


def versus_bf16(recipe: str = "hif8-qat", size: DemoSize = DEMO, backend: str = "cpu") -> Case:
    """Forward, backward, clipping, AdamW, and the commit of the scales."""
    ours, theirs = Run(size, recipe), Run(size, None)
    for _ in range(SETTLE):
        ours.step()
        theirs.step()

    def check() -> None:
        assert ours.layers > 0, "nothing was converted"
        a, b = ours.step(), theirs.step()
        assert math.isfinite(a), f"the loss of the QAT run is {a}"
        assert abs(a - b) <= LOSS_TOLERANCE * b, f"losses {a:.4f} in 8 bits and {b:.4f} in BF16 part too far"

    shape = f"{size.batch}x{size.sequence} tokens"
    fmt = fp8kernels.get_recipe(recipe).weight.fmt
    return Case(
        "train", f"training step, {recipe}", fmt, backend, shape, "the same step in BF16",
        ours.step, theirs.step, check, tuple(f"{verb}/{backend}" for verb in VERBS),
        unit=TIME, extra={"parameters": ours.parameters, "converted_layers": ours.layers},
    )  # fmt: skip


class Run:
    """A model, its optimizer and its batches; the same in every Run of a size."""

    def __init__(self, size: DemoSize, recipe: str | None) -> None:
        torch.manual_seed(9)
        self.model = llama(size.llama)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if recipe is not None:
            fp8kernels.convert(self.model, recipe, verbose=False)
        self.layers = sum(isinstance(module, fp8kernels.nn.Linear) for module in self.model.modules())
        self.optimizer = adamw(self.model, size.learning_rate / 10)
        self.batches = list(batches(size))
        self.count = 0

    def step(self) -> float:
        """One optimizer step; the loss before it."""
        tokens = self.batches[self.count % len(self.batches)]
        self.count += 1
        return train_step(self.model, self.optimizer, tokens)


def batches(size: DemoSize) -> Tensor:
    """Random tokens: a step takes the same time on any text."""
    shape = (BATCHES, size.batch, size.sequence)
    return torch.randint(0, size.llama.vocab, shape, generator=torch.Generator().manual_seed(10))


def test_train(backend: str, race: Callable[[Case], None]) -> None:
    race(versus_bf16(size=QUICK, backend=backend))
