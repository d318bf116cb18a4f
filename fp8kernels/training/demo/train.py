"""Part 2: a small Llama learns Python's standard library in BF16, then goes on in HiF8 beside a matched BF16 run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import convert
from ...models.llama import llama
from ...telemetry import LayerReport, report
from ..pair import Curves, cosine_schedule, fork, train_pair
from ..step import adamw, set_learning_rate, train_step, validation_loss
from ..text import split_text
from ..tokens import byte_tokenizer, consecutive_batches, random_batches, token_stream
from .size import DemoSize

RECIPE = "hif8-qat"
SEED = 2026


@dataclass(frozen=True)
class Text:
    """A tokenizer, and batches of tokens int64 [batch, sequence]: for training without end, and held-out ones."""

    tokenizer: Any
    training: Iterator[Tensor]
    held_out: list[Tensor]
    training_tokens: int


@dataclass(frozen=True)
class TrainingResult:
    """Both models after training, and what was seen on the way.

    error_*          of the QAT run's loss against the BF16 run's at the same step, in percent
    validation_*     mean loss on held-out files: before the runs part, and after, by run
    layers           one row per layer and 8-bit tensor
    """

    plain: nn.Module
    qat: nn.Module
    tokenizer: Any
    parameters: int
    training_tokens: int
    pretrain_loss: list[float]
    curves: Curves
    error_mean: float
    error_max: float
    error_bias: float
    validation_start: float
    validation_plain: float
    validation_qat: float
    time_ratio: float
    plain_milliseconds: float
    layers: list[LayerReport]


def run(size: DemoSize, text: Text, advance: Callable[[str], None]) -> TrainingResult:
    """Pre-train, part, train both; `advance` is called after each step with what to show."""
    rates = cosine_schedule(
        size.learning_rate, size.pretrain_steps + size.paired_steps, warmup=max(2, size.pretrain_steps // 10)
    )
    model, optimizer = fresh(size, text.tokenizer)
    pretrain_loss = []
    for rate in rates[: size.pretrain_steps]:
        set_learning_rate(optimizer, rate)
        pretrain_loss.append(train_step(model, optimizer, next(text.training)))
        advance(f"BF16 pre-training, loss {pretrain_loss[-1]:.2f}")
    start = validation_loss(model, text.held_out)
    qat, qat_optimizer = fork(model, optimizer)
    convert(qat, RECIPE, verbose=False)
    curves = train_pair(
        (model, optimizer),
        (qat, qat_optimizer),
        text.training,
        rates[size.pretrain_steps :],
        lambda so_far: advance(f"BF16 {so_far.plain_loss[-1]:.2f} beside HiF8 QAT {so_far.other_loss[-1]:.2f}"),
    )
    errors = curves.error_percent()
    with torch.autocast("cpu", torch.bfloat16):
        layers = report(qat, {"input_ids": text.held_out[0], "use_cache": False})
    return TrainingResult(
        plain=model,
        qat=qat,
        tokenizer=text.tokenizer,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        training_tokens=text.training_tokens,
        pretrain_loss=pretrain_loss,
        curves=curves,
        error_mean=sum(map(abs, errors)) / len(errors),
        error_max=max(map(abs, errors)),
        error_bias=sum(errors) / len(errors),
        validation_start=start,
        validation_plain=validation_loss(model, text.held_out),
        validation_qat=validation_loss(qat, text.held_out),
        time_ratio=curves.time_ratio(),
        plain_milliseconds=1e3 * sorted(curves.plain_seconds)[len(curves.plain_seconds) // 2],
        layers=layers,
    )


def steps(size: DemoSize) -> int:
    """How often `run` calls `advance`."""
    return size.pretrain_steps + size.paired_steps


def prepare(size: DemoSize) -> Text:
    """Read the standard library's sources, learn a tokenizer on the training files, and cut both parts into batches."""
    training, held_out = split_text(size.text_bytes)
    tokenizer = byte_tokenizer(training, size.llama.vocab)
    stream = token_stream(tokenizer, training)
    return Text(
        tokenizer,
        random_batches(stream, size.batch, size.sequence, seed=SEED),
        consecutive_batches(token_stream(tokenizer, held_out), size.batch, size.sequence, most=size.validation_batches),
        len(stream),
    )


def fresh(size: DemoSize, tokenizer: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The demo's Llama with the same random weights each time, and its AdamW."""
    torch.manual_seed(SEED)
    end = 0 if tokenizer is None else tokenizer.eos_token_id
    model = llama(size.llama, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model, adamw(model, size.learning_rate)
