"""One run of the study: from the base, on text alone, in one setting of the factors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert
from ..models.causal_lm import load_causal_lm
from ..nn.step import commit
from ..telemetry.saturation import Measurement, SaturationWatch
from ..training.pair import cosine_schedule
from ..training.step import CLIP, adamw, set_learning_rate
from ..training.tokens import random_batches
from .base import Material, answers, block_losses, blocks, exams, quiet, read_material
from .grid import Grid
from .ranks import Ranks
from .settings import Settings

MEASURED = 8  # steps from one look at the tensors to the next
ROUNDED = 5  # decimals of a loss in a row


@dataclass(frozen=True)
class Task:
    """What one process does."""

    grid: Grid
    settings: Settings
    seed: int
    base: Path


def run(task: Task, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train and examine; returns the run's row (rows.py).

    raises   ValueError if the loss is not finite, naming run and step
    """
    ranks = ranks or Ranks()
    grid, settings = task.grid, task.settings
    quiet()
    torch.set_num_threads(grid.threads)
    started, computed = time.perf_counter(), time.process_time()
    model, tokenizer = load_causal_lm(task.base, dtype="float32")
    model.to(grid.device)
    torch.manual_seed(task.seed)
    watch = prepare(model, settings, ranks)
    read = read_material(task.base)
    exam, cloze = exams(grid)
    losses = train(model, task, read, ranks)
    trained = time.perf_counter() - started
    row = {
        "name": settings.name(),
        "settings": {f.name: v for f in fields(Settings) if (v := getattr(settings, f.name)) != f.default},
        "seed": task.seed,
        "losses": [round(loss, ROUNDED) for loss in losses],
        "validation": block_losses(model, blocks(grid, read), grid.device),
        "exam": answers(model, tokenizer, exam),
        "cloze": answers(model, tokenizer, cloze),
        "tensors": {} if watch is None else tensors(watch.take()),
    }
    seconds = {"training": trained, "all": time.perf_counter() - started}
    row["seconds"] = {k: round(v, 1) for k, v in (seconds | {"cpu": time.process_time() - computed}).items()}
    if watch is not None:
        watch.remove()
    return row


def prepare(model: nn.Module, settings: Settings, ranks: Ranks) -> SaturationWatch | None:
    """Convert the model as the settings say, and watch its tensors; None where nothing is 8-bit."""
    recipe = settings.recipe(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    if not settings.master:
        model.to(torch.bfloat16)
    if recipe is None:
        return None
    convert(model, recipe, group=None if settings.reduced else ranks.alone, verbose=False)
    return SaturationWatch(model, every=MEASURED, policy="ignore")


def train(model: nn.Module, task: Task, read: Material, ranks: Ranks) -> list[float]:
    """The steps of a run; returns the loss of each, before it, over the whole batch of all ranks."""
    grid, settings, part = task.grid, task.settings, task.grid.train
    optimizer = adamw(model, settings.learning_rate)
    batches = random_batches(read.text, part.batch, part.sequence, seed=task.seed)
    rates = cosine_schedule(settings.learning_rate, part.steps, warmup=part.rise, floor=0.0)
    model.train()
    losses = []
    for step, (rate, tokens) in enumerate(zip(rates, batches, strict=False), start=1):
        set_learning_rate(optimizer, rate)
        with outlier(model, settings.spike if step == part.spike_step else 0.0):
            loss = 0.0
            for micro in ranks.part(tokens).to(grid.device).chunk(settings.micro_batches):
                one = language_loss(model, micro, twice=settings.labels == "shifted twice") / settings.micro_batches
                one.backward()
                loss += one.item()
                if settings.unit == "call" and settings.precision == "hif8":
                    commit(model)
            ranks.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(ranks.average(loss))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"{settings.name()}, seed {task.seed}: the loss is {losses[-1]} at step {step}")
    return losses


def language_loss(model: nn.Module, tokens: Tensor, *, twice: bool) -> Tensor:
    """The loss under bf16 autocast on int64 [batch, sequence]; the model shifts the labels itself.

    twice   labels come shifted already, so that the model learns the token after the next
    """
    inputs, labels = (tokens[:, :-1], tokens[:, 1:]) if twice else (tokens, tokens)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss: Tensor = model(input_ids=inputs, labels=labels, use_cache=False).loss
    return loss


@contextmanager
def outlier(model: nn.Module, factor: float) -> Iterator[None]:
    """Within the block one neuron of the middle MLP is an outlier: `factor` times larger, and read by as much less.

    Its row of up_proj is multiplied and its column of down_proj divided, so that with a power of two the model computes
    the same function in floating point; amax of that weight and of that activation rise. Afterwards both are as before
    """
    if not factor:
        yield
        return
    layers: Any = model.model.layers  # type: ignore[union-attr]
    mlp = layers[len(layers) // 2].mlp
    up, down = mlp.up_proj.weight, mlp.down_proj.weight
    neuron = int(up.abs().amax(1).argmax())  # the row that holds the amax
    row, column = up[neuron].detach().clone(), down[:, neuron].detach().clone()
    with torch.no_grad():
        up[neuron].mul_(factor)
        down[:, neuron].div_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            up[neuron].copy_(row)
            down[:, neuron].copy_(column)


def tensors(measurements: list[Measurement]) -> dict[str, dict[str, float]]:
    """By role, over layers and measured steps in 8 bits: how stale scales were, and what rounding did.

    stale      the share of tensors whose amax was past scale * target; worst: the largest ratio
    past       elements past the target, in percent; saturated: beyond the format's range, in percent
    sqnr_db    the mean; lowest: of one tensor
    """
    out = {}
    readings = [r for m in measurements for r in m.readings if not r.high]
    for role in sorted({r.role for r in readings}):
        own = [r for r in readings if r.role == role]
        noise = [r.sqnr_db for r in own if r.sqnr_db is not None] or [math.nan]
        out[role] = {
            "stale": sum(r.stale > 1.001 for r in own) / len(own),
            "worst": max(r.stale for r in own),
            "past": 100 * sum(r.past_target for r in own) / len(own),
            "saturated": 100 * sum(r.past_maximum for r in own) / len(own),
            "sqnr_db": sum(noise) / len(noise),
            "lowest": min(noise),
        }
        out[role] = {key: float(f"{value:.4g}") for key, value in out[role].items()}
    return out
