"""One optimizer step: QAT of the demo's model on a CPU, and of a 1B model on a GPU, against the same step in BF16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fp8kernels
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.recipe import Recipe
from fp8kernels.scaling.delayed import WEIGHT
from fp8kernels.training.demo.size import FULL as DEMO
from fp8kernels.training.demo.size import QUICK, DemoSize
from fp8kernels.training.step import adamw, train_step

from .case import ANY, SPEED, TIME, Case, device_of, noted
from .cuda_time import events_only
from .shapes import PANGU

SETTLE = 3  # steps; the first ones allocate, and make the first scales
LOSS_TOLERANCE = 0.02  # of the loss after a few steps from the same weights, on the same batch
BATCHES = 8  # different ones, in turn
VERBS = ("quantize", "gemm", "dequantize", "commit")  # that a step calls


@dataclass(frozen=True)
class StepSize:
    """A model and the tokens of one of its steps; `config` goes to LlamaConfig."""

    llama: LlamaSize
    batch: int
    sequence: int
    config: tuple[tuple[str, Any], ...] = ()
    learning_rate: float = 1e-4


# openPangu-Embedded-1B, as its config.json has it, on 8k tokens in the sequences that it is trained with in
# arXiv 2605.26189. What it is called there is a Llama with biases
PANGU_1B = StepSize(
    LlamaSize(vocab=153376, hidden=1536, intermediate=6144, layers=26, heads=12, kv_heads=6, context=1024),
    batch=8, sequence=1024, config=(("attention_bias", True), ("tie_word_embeddings", True), ("rms_norm_eps", 1e-5)),
)  # fmt: skip
# a Llama of 30M parameters, embeddings and head included, on 1k tokens: what one trains on a CPU
LLAMA_30M = StepSize(LlamaSize(vocab=8192, hidden=512, intermediate=1408, layers=7, heads=8, context=256), 4, 256)
MODELS = {"demo": DEMO, "llama-30m": LLAMA_30M}
TINY = StepSize(LlamaSize(256, 64, 128, 2, 4, 64, kv_heads=2), 2, 64)


def compiled(
    recipe: str, grad: str | None = None, size: StepSize = PANGU_1B, backend: str = ANY, against: str = "bf16"
) -> Case:
    """A step of the converted model against the plain one, both under torch.compile; or against torchao's float8.

    grad     the format of output gradients, or None: they stay BF16 and so do two products of three
    against  "bf16" or "torchao"
    """
    device = device_of(backend)
    changed = fp8kernels.get_recipe(recipe).with_format(grad=grad)
    ours = Run(size, changed, device=device, prepare=_compile)
    theirs = Run(size, None, device=device, prepare=_compile if against == "bf16" else _torchao)
    with noted() as kernels:
        for _ in range(SETTLE):
            ours.step()
    for _ in range(SETTLE):
        theirs.step()

    def check() -> None:
        assert ours.layers > 0, "nothing was converted"
        a, b = ours.step(), theirs.step()
        assert math.isfinite(a), f"the loss of the QAT run is {a}"
        assert abs(a - b) <= LOSS_TOLERANCE * b, f"losses {a:.4f} in 8 bits and {b:.4f} in BF16 part too far"

    name = recipe if grad is None else f"{recipe}, gradients {grad}"
    return Case(
        "train", f"training step of {PANGU.name}'s shape, {name}" if size is PANGU_1B else f"training step, {name}",
        fp8kernels.get_recipe(recipe).weight.fmt, backend, f"{size.batch}x{size.sequence} tokens",
        "BF16 under torch.compile" if against == "bf16" else "torchao float8 tensorwise under torch.compile",
        ours.step, theirs.step, check, tuple(sorted(kernels)), unit=SPEED, device=device,
        clock=events_only if device == "cuda" else None,
        extra={"parameters": ours.parameters, "converted_layers": ours.layers},
    )  # fmt: skip


def _compile(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def _torchao(model: nn.Module) -> nn.Module:
    """The linear layers as torchao's float8 training has them, one scale a tensor; its head stays as it is."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"torchao is not installed: {error}") from None
    convert_to_float8_training(model, module_filter_fn=lambda module, name: "lm_head" not in name)
    return _compile(model)


def versus_bf16(
    recipe: str = "hif8-qat", model: str = "demo", backend: str = "cpu", size: DemoSize | StepSize | None = None
) -> Case:
    """Forward, backward, clipping, AdamW, and the commit of the scales; of one of MODELS, or of any size."""
    name, size = (model, MODELS[model]) if size is None else ("any", size)
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
        "train", f"training step, {recipe}" + (f", {name}" if name == "llama-30m" else ""), fmt, backend, shape,
        "the same step in BF16",
        ours.step, theirs.step, check, tuple(f"{verb}/{backend}" for verb in VERBS),
        unit=TIME, extra={"parameters": ours.parameters, "converted_layers": ours.layers},
    )  # fmt: skip


def commit_of_step(recipe: str = "hif8-qat", size: DemoSize = DEMO, backend: str = "cpu") -> Case:
    """The commit of a model's scales after a forward and backward, against a whole training step with its commit."""
    run, step = Run(size, recipe), Run(size, recipe)
    for _ in range(SETTLE):
        run.step()
        step.step()
    layers = [module for module in run.model.modules() if isinstance(module, fp8kernels.nn.Linear)]
    pending = [layer.fp8_pending for layer in layers]
    run.model(input_ids=run.batches[0])
    seen = [amax.clone() for amax in pending]

    def commit() -> None:
        torch._foreach_copy_(pending, seen)  # as after a forward; a commit of nothing would be less work
        fp8kernels.commit(run.model)

    def check() -> None:
        commit()
        for layer, amax in zip(layers, seen, strict=True):
            newest = layer.fp8_history[WEIGHT, 0]  # an input that several layers share is pending in one of them
            assert newest == amax[WEIGHT], f"{layer.fp8_name}: {newest} in the history, pending was {amax[WEIGHT]}"
            assert not layer.fp8_pending.any(), f"{layer.fp8_name}: something is pending after a commit"

    return Case(
        "train", f"commit of a training step, {recipe}", fp8kernels.get_recipe(recipe).weight.fmt, backend,
        f"{len(pending)} layers", "a QAT training step", commit, step.step, check, (f"commit/{backend}",), unit=TIME,
    )  # fmt: skip


class Run:
    """A model, its optimizer and its batches; the same in every Run of a size."""

    def __init__(
        self,
        size: DemoSize | StepSize,
        recipe: str | Recipe | None,
        device: str = "cpu",
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        """`prepare` is what becomes of the model last: compilation, for example."""
        torch.manual_seed(9)
        with torch.device(device):
            self.model = llama(size.llama, **dict(getattr(size, "config", ())))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if recipe is not None:
            fp8kernels.convert(self.model, recipe, verbose=False)
        self.layers = sum(isinstance(module, fp8kernels.nn.Linear) for module in self.model.modules())
        self.optimizer = adamw(self.model, size.learning_rate / 10)
        self.model = prepare(self.model)
        self.batches = list(batches(size).to(device))
        self.count = 0

    def step(self) -> float:
        """One optimizer step; the loss before it."""
        tokens = self.batches[self.count % len(self.batches)]
        self.count += 1
        return train_step(self.model, self.optimizer, tokens)


def batches(size: DemoSize | StepSize) -> Tensor:
    """Random tokens: a step takes the same time on any text."""
    shape = (BATCHES, size.batch, size.sequence)
    return torch.randint(0, size.llama.vocab, shape, generator=torch.Generator().manual_seed(10))


def test_train(backend: str, race: Callable[[Case], None]) -> None:
    race(versus_bf16(size=QUICK, backend=backend))


def test_commit_of_step(backend: str, race: Callable[[Case], None]) -> None:
    race(commit_of_step(size=QUICK, backend=backend))


def test_train_compiled(backend: str, race: Callable[[Case], None]) -> None:
    race(compiled("e4m3-delayed", size=TINY, backend=ANY if backend == "cpu" else backend))
