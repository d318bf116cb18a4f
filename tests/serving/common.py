"""A tiny Llama after a few QAT steps, its tokenizer, and what the tests of export and serving share."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fp8kernels.convert import convert
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.training.step import adamw, train_step
from fp8kernels.training.tokens import byte_tokenizer, random_batches, token_stream

# Widths are multiples of 128, so that every block fits.
SIZE = LlamaSize(vocab=300, hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, context=64)
TEXT = ["def add(a, b):\n    return a + b\n" * 40, "class Sum:\n    def total(self):\n        return self.value\n" * 40]
PROMPT = "def add(a"


def tokenizer() -> Any:
    """A byte-level BPE of 300 tokens learnt from TEXT."""
    return byte_tokenizer(TEXT, SIZE.vocab)


def plain(seed: int = 0, **config: Any) -> Any:
    """The model in fp32, not converted and not trained; `config` goes to LlamaConfig."""
    torch.manual_seed(seed)
    end = tokenizer().eos_token_id
    return llama(SIZE, bos_token_id=end, eos_token_id=end, pad_token_id=end, **config)


def trained(recipe: Any, steps: int = 6, **config: Any) -> Any:
    """The model converted by `recipe` and trained for a few steps, so that its delayed scales stand; in eval mode."""
    model = convert(plain(**config), recipe, verbose=False)
    optimizer = adamw(model, 3e-3)
    batches = random_batches(token_stream(tokenizer(), TEXT), 4, 32, seed=0)
    losses = [train_step(model, optimizer, next(batches)) for _ in range(steps)]
    assert losses[-1] < losses[0], f"training should have begun: {losses}"
    return model.eval()


def prompt_ids() -> torch.Tensor:
    """PROMPT as token ids [1, length]."""
    return torch.tensor([tokenizer()(PROMPT)["input_ids"]])
