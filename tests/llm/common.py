"""A tiny Llama and its tokenizer in a folder, local text, and what the tests of training on them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.training.tokens import byte_tokenizer

VOCAB, CONTEXT = 300, 64
SIZE = LlamaSize(vocab=VOCAB, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, context=CONTEXT)


def texts(count: int = 40, words: int = 60) -> list[str]:
    """Documents of made-up but regular sentences: the same ones for the same arguments."""
    names, things = ("Ada", "Bruno", "Clara", "Dmitri", "Esme"), ("maps", "clocks", "lenses", "ropes", "bells", "kites")
    return [
        " ".join(
            f"{names[(n * 7 + i) % 5]} sells {things[(n * 3 + i * i) % 6]} on day {(n + i) % 9}."
            for i in range(max(1, words // 6))
        )
        for n in range(count)
    ]


def tokenizer() -> Any:
    """A byte-level BPE of VOCAB tokens learnt from `texts`."""
    return byte_tokenizer(texts(), VOCAB)


def model(seed: int = 0) -> Any:
    """A two-layer Llama in fp32; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return llama(SIZE, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def model_folder(folder: Path, seed: int = 0) -> Path:
    """The model and its tokenizer as transformers saves them."""
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text_file(folder: Path, count: int = 40) -> Path:
    """`texts` as JSON lines with the field "text"."""
    import json

    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count)), encoding="utf-8")
    return path
