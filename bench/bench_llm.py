"""W8A8 training of a language model: how far its loss is from that of BF16, and what watching its tensors costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fp8kernels
from fp8kernels.models.llama import llama
from fp8kernels.recipe import Recipe
from fp8kernels.statistics import ape
from fp8kernels.telemetry.saturation import SaturationWatch
from fp8kernels.training.demo.size import FULL as DEMO
from fp8kernels.training.demo.size import QUICK, DemoSize
from fp8kernels.training.demo.train import prepare
from fp8kernels.training.pair import Curves, cosine_schedule, fork, train_pair
from fp8kernels.training.step import adamw, set_learning_rate, train_step

from .bench_train import SETTLE, Run
from .case import PERCENT, TIME, Case
from .measure import Samples

VERBS = ("quantize", "gemm", "dequantize", "commit")
PEAK = 1e-5  # the learning rate of the published run, arXiv 2605.26189
WARM_UP = 10  # optimizer steps in BF16; the published 500 are a twentieth of a run of 10,000


def loss_error(
    recipe: str = "hif8-qat-mlp",
    size: DemoSize = DEMO,
    backend: str = "cpu",
    blocks: tuple[int, int] = (1, 1),
    learning_rate: float = PEAK,
) -> Case:
    """The absolute error of the loss of each step after the warm-up, in percent of that of the matched BF16 run.

    A sample is a step; both runs begin from one pre-trained model and see the same batches.

    blocks   the first and last blocks that stay in BF16; the published 3 and 2 are for 26 of them
    """
    text = prepare(size)
    torch.manual_seed(9)
    model = llama(size.llama)
    optimizer = adamw(model, size.learning_rate)
    for rate in cosine_schedule(size.learning_rate, size.pretrain_steps, warmup=max(2, size.pretrain_steps // 10)):
        set_learning_rate(optimizer, rate)
        train_step(model, optimizer, next(text.training))
    other, other_optimizer = fork(model, optimizer)
    changed: Recipe = fp8kernels.get_recipe(recipe).replace(high_precision_blocks=blocks, warmup_steps=WARM_UP)
    fp8kernels.convert(other, changed, verbose=False)
    rates = cosine_schedule(learning_rate, WARM_UP + size.paired_steps, warmup=WARM_UP, floor=0.0)
    curves: list[Curves] = []

    def train() -> Curves:
        if not curves:
            curves.append(train_pair((model, optimizer), (other, other_optimizer), text.training, rates))
        return curves[0]

    def check() -> None:
        done = train()
        assert done.plain_loss[:WARM_UP] == done.other_loss[:WARM_UP], "the runs part before the first 8 bits"
        assert done.plain_loss[-1] != done.other_loss[-1], "nothing was computed in 8 bits"

    def samples(*_: Any) -> Samples:
        done = train()
        errors = ape(done.other_loss[WARM_UP:], done.plain_loss[WARM_UP:])
        return Samples([each / 1e3 for each in errors], [each / 1e3 for each in done.plain_loss[WARM_UP:]], "losses")

    return Case(
        "llm", f"absolute error of the loss, {recipe}", changed.weight.fmt, backend,
        f"{size.batch}x{size.sequence} tokens, {size.paired_steps} steps", "the matched BF16 run",
        train, train, check, tuple(f"{verb}/{backend}" for verb in VERBS), unit=PERCENT, clock=samples,
        extra={"learning_rate": learning_rate, "parameters": sum(p.numel() for p in model.parameters())},
    )  # fmt: skip


def watch(recipe: str = "hif8-qat", size: DemoSize = DEMO, backend: str = "cpu") -> Case:
    """A training step in which SaturationWatch measures all tensors, against the same step without."""
    ours, theirs = Run(size, recipe), Run(size, recipe)
    watching = SaturationWatch(ours.model, every=1, policy="ignore")
    for _ in range(SETTLE):
        ours.step()
        theirs.step()

    def check() -> None:
        watching.take()
        assert ours.step() == theirs.step(), "watching changed the loss"
        (seen,) = watching.take()
        assert len({reading.layer for reading in seen.readings}) == ours.layers, "not all layers were measured"

    def step() -> None:
        ours.step()
        watching.take()

    return Case(
        "llm", f"a step that is measured for saturation, {recipe}", fp8kernels.get_recipe(recipe).weight.fmt, backend,
        f"{size.batch}x{size.sequence} tokens", "the same step", step, theirs.step, check,
        tuple(f"{verb}/{backend}" for verb in VERBS), unit=TIME, extra={"converted_layers": ours.layers},
    )  # fmt: skip


def test_loss_error(backend: str, race: Callable[[Case], None]) -> None:
    race(loss_error("hif8-qat", size=QUICK, backend=backend, blocks=(0, 0), learning_rate=1e-3))


def test_watch(backend: str, race: Callable[[Case], None]) -> None:
    race(watch(size=QUICK, backend=backend))
