"""A folder to serve, and servers on it: the command in a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8kernels.convert import convert
from fp8kernels.export import export
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.training.step import adamw, train_step
from fp8kernels.training.tokens import byte_tokenizer, random_batches, token_stream

SIZE = LlamaSize(vocab=300, hidden=64, intermediate=128, layers=2, heads=2, context=4096)
TEXT = ["def add(a, b):\n    return a + b\n" * 40, "class Sum:\n    def total(self):\n        return self.value\n" * 40]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)
PROMPT = "def add(a"
SECONDS = 120  # that a server has to start or end on a busy machine


def write_folder(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """A tiny Llama after a few QAT steps in HiF8, which has learnt to go on and never to stop."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEXT, SIZE.vocab)
    end = tokenizer.eos_token_id
    model = convert(llama(SIZE, bos_token_id=end, eos_token_id=end, pad_token_id=end), "hif8-qat", verbose=False)
    optimizer = adamw(model, 3e-3)
    batches = random_batches(token_stream(tokenizer, TEXT), 4, 32, seed=0)
    for _ in range(10):
        train_step(model, optimizer, next(batches))
    tokenizer.chat_template = template
    export(model, folder, tokenizer=tokenizer, dtype=torch.float32)
    return folder


@dataclass
class Running:
    """A server that answers."""

    url: str
    process: subprocess.Popen[str]

    def client(self, key: str = "none", retries: int = 0) -> Any:
        """OpenAI's own client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=SECONDS)


def launch(folder: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command's process, not yet ready; the last of two ports counts."""
    words = (sys.executable, "-m", "fp8kernels", "serve", str(folder), "--port", "0", *words)
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings)


@contextmanager
def running(folder: Path, *words: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """A server until the end of the block, if the block does not end it."""
    process = launch(folder, *words, environment=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "serving " not in line:
            raise AssertionError(f"the server did not start: {line!r} {process.communicate()[1]}")
        yield Running(line.split(" on ")[1].strip().removesuffix("/v1"), process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
