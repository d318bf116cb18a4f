"""generate: text from a prompt, greedily, with the time it took."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nn.inference import nbytes
from .load import load, load_tokenizer


@dataclass(frozen=True)
class Run:
    """What one process generated.

    tokens             new tokens of one generation
    tokens_per_second  the median over the repeats, batch 1, prompt included
    load_seconds       from the call to the model ready in memory
    model_bytes        parameters and buffers in memory
    """

    text: str
    tokens: int
    tokens_per_second: float
    load_seconds: float
    model_bytes: int


def generate(folder: str | Path, prompt: str, *, new_tokens: int = 64, repeats: int = 1) -> Run:
    """Continue the prompt with exactly `new_tokens` tokens, `repeats` times after one warm-up where it is timed.

    raises   as `load`; ValueError for an empty prompt, or one that does not fit the model's context
    """
    started = time.perf_counter()
    model, tokenizer = load(folder), load_tokenizer(folder)
    load_seconds = time.perf_counter() - started
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None)
    if length == 0:
        raise ValueError("the prompt is empty; give at least one word")
    if context is not None and length + new_tokens > context:
        raise ValueError(f"{length} prompt tokens and {new_tokens} new ones exceed the model's context of {context}")
    settings = {
        "attention_mask": torch.ones_like(inputs["input_ids"]),
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    seconds = []
    with torch.inference_mode():
        if repeats > 1:
            model.generate(inputs["input_ids"], **settings)  # warm-up
        for _ in range(repeats):
            started = time.perf_counter()
            out = model.generate(inputs["input_ids"], **settings)  # [1, length + new_tokens]
            seconds.append(time.perf_counter() - started)
    return Run(
        text=tokenizer.decode(out[0]),
        tokens=out.shape[1] - length,
        tokens_per_second=(out.shape[1] - length) / statistics.median(seconds),
        load_seconds=load_seconds,
        model_bytes=nbytes(model),
    )
