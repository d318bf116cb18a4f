"""Serving over HTTP: what clients at once get, against generate() alone in this process."""

from __future__ import annotations

import atexit
import contextlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fp8kernels.convert import convert
from fp8kernels.export import export
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.serving import load, load_tokenizer
from fp8kernels.training.step import adamw, train_step
from fp8kernels.training.tokens import byte_tokenizer, random_batches, token_stream

from . import load_test
from .case import TIME, Case

SIZE = LlamaSize(vocab=300, hidden=512, intermediate=1408, layers=8, heads=8, context=512)  # about 27M weights
TEXT = ["def add(a, b):\n    return a + b\n" * 40, "class Sum:\n    def total(self):\n        return self.value\n" * 40]


class Served:
    """A folder with a model in it, its server, and the same model here; made when first asked for."""

    def __init__(self, recipe: str, clients: int, tokens: int) -> None:
        self.recipe, self.clients, self.tokens = recipe, clients, tokens
        self.open = contextlib.ExitStack()
        atexit.register(self.open.close)

    @classmethod
    @cache
    def once(cls, recipe: str, clients: int, tokens: int) -> Served:
        """The same server for every time that a case is built."""
        return cls(recipe, clients, tokens)

    @cache  # noqa: B019  one object a case, which lives as long as the process
    def folder(self) -> Path:
        """A Llama after a few steps, which goes on with code."""
        torch.manual_seed(0)
        tokenizer = byte_tokenizer(TEXT, SIZE.vocab)
        model = convert(llama(SIZE), self.recipe, verbose=False)
        optimizer, batches = adamw(model, 1e-3), random_batches(token_stream(tokenizer, TEXT), 4, 32, seed=0)
        for _ in range(4):
            train_step(model, optimizer, next(batches))
        folder = Path(self.open.enter_context(tempfile.TemporaryDirectory())) / "model"
        export(model, folder, tokenizer=tokenizer)
        return folder

    @cache  # noqa: B019
    def url(self) -> str:
        """Where the server answers."""
        return self.open.enter_context(load_test.server(self.folder(), "--waiting", str(self.clients)))

    @cache  # noqa: B019
    def here(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return load(self.folder()), load_tokenizer(self.folder())

    def over_http(self) -> list[str]:
        """One request of each client at once; raises RuntimeError where one has no answer."""
        found, answers = load_test.run(self.url(), clients=self.clients, requests=self.clients, tokens=self.tokens)
        if found.answered != self.clients:
            raise RuntimeError(f"{self.clients} requests, of which {found.answered} were answered: {found}")
        return sorted(answer.text for answer in answers)

    def in_process(self) -> list[str]:
        """The same texts from generate(), one after another."""
        model, tokenizer = self.here()
        texts = []
        for client in range(self.clients):
            inputs = tokenizer(f"{load_test.PROMPT}{client}", return_tensors="pt")
            out = model.generate(**inputs, do_sample=False, max_new_tokens=self.tokens)
            texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return sorted(texts)


def over_http(recipe: str = "hif8-qat", clients: int = 8, tokens: int = 16) -> Case:
    """The time of one request from each of several clients at once, streamed, against generate() without a server.

    Checked before it is timed: no request is lost, refused or failed, and the texts are those of generate().
    """
    served = Served.once(recipe, clients, tokens)

    def check() -> None:
        got, wanted = served.over_http(), served.in_process()
        assert got == wanted, f"over HTTP {got}, in process {wanted}"

    return Case(
        "serve", "serve over HTTP, clients at once", recipe, "cpu", f"{clients} clients, {tokens} tokens",
        "generate() in process, one after another", served.over_http, served.in_process, check, ("gemm/cpu",),
        unit=TIME,
    )  # fmt: skip


def test_serve(race: Callable[[Case], None]) -> None:
    race(over_http())
