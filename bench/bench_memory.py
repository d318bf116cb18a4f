"""Peak activation memory of one Llama block in training, against the same block in BF16."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fp8kernels

from .case import MEMORY, Case, Shape, text
from .measure import Samples
from .memory import memory_of

BLOCK: Shape = (8, 1024, 1024, 2752)  # batch, sequence, hidden, intermediate; 8k tokens, as the steps on a GPU have
SMALL: Shape = (2, 64, 128, 352)
HEAD = 64  # elements of an attention head
VERBS = ("quantize", "gemm", "dequantize", "commit")
SETTLE = 2  # steps; the first scales are made of the tensors themselves


def block(
    recipe: str = "hif8-qat", shape: Shape = BLOCK, backend: str = "cpu", *, autocast: bool = False, blocks: int = 1
) -> Case:
    """Forward and backward of transformers' Llama block, from an input that is there before.

    autocast  weights and residuals in fp32, products in bf16; else all is bf16
    blocks    that stand one behind the other
    counted   all that is allocated after the beginning and given back before the end. So gradients are not, nor the
              codes of weights, which are made once a step for all its micro-batches: the row has their bytes
    """
    ours, theirs = (Training(each, shape, autocast=autocast, blocks=blocks) for each in (recipe, None))

    def check() -> None:
        assert ours.layers == 7 * blocks, f"{ours.layers} layers were converted, there are {7 * blocks}"
        a, b = ours.output(), theirs.output()
        assert float((a - b).norm() / b.norm()) < 0.1, "the outputs part too far"  # 8-bit rounding alone makes 0.03

    def samples(one: Callable[[], object], other: Callable[[], object], seconds: float) -> Samples:
        return Samples([memory_of(one).peak / 1e9], [memory_of(other).peak / 1e9], "peak bytes")

    what = f"{blocks} Llama block{'s' * (blocks > 1)}{', autocast' * autocast}"
    return Case(
        "memory", f"peak activation memory of {what}, {recipe}",
        fp8kernels.get_recipe(recipe).weight.fmt, backend, text(shape), "the same in BF16",
        ours.step, theirs.step, check, tuple(f"{verb}/{backend}" for verb in VERBS), unit=MEMORY, clock=samples,
        extra={"weight_code_bytes": ours.weight_codes()},
    )  # fmt: skip


class Training:
    """Blocks of a Llama, and one forward and backward of them."""

    def __init__(self, recipe: str | None, shape: Shape, *, autocast: bool = False, blocks: int = 1) -> None:
        batch, sequence, hidden, intermediate = shape
        torch.manual_seed(11)
        self.autocast = autocast
        dtype = torch.float32 if autocast else torch.bfloat16
        self.blocks, rotary = llama_blocks(hidden, intermediate, sequence, blocks)
        self.blocks.to(dtype)
        if recipe is not None:
            fp8kernels.convert(self.blocks, recipe, verbose=False)
        self.layers = sum(isinstance(module, fp8kernels.nn.Linear) for module in self.blocks.modules())
        self.x = torch.randn(batch, sequence, hidden, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(batch, sequence, hidden, dtype=dtype)
        self.positions = rotary(self.x, torch.arange(sequence)[None])
        for _ in range(SETTLE):
            self.step()
            if recipe is not None:
                fp8kernels.commit(self.blocks)
        self.step()  # a micro-batch of the step that is measured: weights have their codes

    def output(self) -> Tensor:
        x = self.x
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for each in self.blocks:
                x = each(x, position_embeddings=self.positions, attention_mask=None)
        return x

    def step(self) -> None:
        """One forward and backward; gradients are there anew afterwards."""
        self.blocks.zero_grad(set_to_none=True)
        self.x.grad = None
        self.output().backward(self.dy)

    def weight_codes(self) -> int:
        layers = (m for m in self.blocks.modules() if isinstance(m, fp8kernels.nn.Linear))
        return sum(layer.weight.numel() for layer in layers)


def llama_blocks(hidden: int, intermediate: int, context: int, count: int) -> tuple[nn.ModuleList, Any]:
    """transformers' Llama blocks with random weights, and what makes their rotary embeddings."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched to build a model from a size
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD, max_position_embeddings=context, attn_implementation="sdpa",
    )  # fmt: skip
    return nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(count)), LlamaRotaryEmbedding(config)


def test_memory(backend: str, race: Callable[[Case], None]) -> None:
    race(block(shape=SMALL, backend=backend))
