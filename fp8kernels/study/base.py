"""The model that all runs start from: trained in BF16 on text and on the world, until it passes most of the exam."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export.atomic import staged_folder
from ..models.causal_lm import load_causal_lm
from ..models.llama import llama
from ..probe.items import Item
from ..probe.score import score
from ..training.pair import cosine_schedule
from ..training.step import adamw, set_learning_rate, train_step
from ..training.text import HELD_OUT, split_text
from ..training.tokens import byte_tokenizer, consecutive_batches, random_batches, token_stream
from . import world
from .grid import Grid

TOKENIZER_TELLS = 20  # times the world is told to the tokenizer, so that its names and values become few tokens
MATERIAL = "material.pt"
SCORED = 128  # sequences of an exam at once
PASSES = 60  # different tellings of the world that the base draws its windows from


@dataclass
class Material:
    """What runs read, int64 [tokens]: text for the base, other text for the study, held-out text."""

    base_text: Tensor
    text: Tensor
    held_out: Tensor


def quiet() -> None:
    """No progress bars of transformers for each of many models of a few megabytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def texts(grid: Grid) -> tuple[list[str], list[str], list[str]]:
    """Documents for the base, for the study and held out; no document is in two of them.

    raises   FileNotFoundError naming a file that is not there, ValueError if there are too few documents
    """
    if grid.text.files:
        paths = [Path(name) for name in grid.text.files]
        absent = [str(path) for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"text.files of the grid: not there: {', '.join(absent)}")
        documents = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        held_out = documents[::HELD_OUT]
        training = [document for index, document in enumerate(documents) if index % HELD_OUT]
    else:
        training, held_out = split_text(grid.text.bytes)
    if len(training) < 2:
        raise ValueError(f"the study needs text of at least 3 documents, there are {len(training) + len(held_out)}")
    return training[::2], training[1::2], held_out


def material(grid: Grid, tokenizer: Any) -> Material:
    """Everything that is read, as tokens."""
    return Material(*(token_stream(tokenizer, documents) for documents in texts(grid)))


def read_material(folder: Path) -> Material:
    """What `train_base` kept beside the base, so that no run has to make tokens of text."""
    return Material(**torch.load(folder / MATERIAL))


def exams(grid: Grid) -> tuple[list[Item], list[Item]]:
    """The multiple-choice and the cloze items of the grid's world."""
    facts = world.world(grid.world.people, seed=grid.world.seed)
    return world.exam(facts, seed=grid.world.seed), world.cloze(facts)


def fresh(grid: Grid) -> tuple[nn.Module, Any]:
    """A Llama with random weights of the grid's size, and a tokenizer learnt from the base's text and the world."""
    facts = world.world(grid.world.people, seed=grid.world.seed)
    told = world.tell(facts, TOKENIZER_TELLS, seed=grid.base.seed)
    tokenizer = byte_tokenizer(texts(grid)[0] + told, grid.model.vocab)
    torch.manual_seed(grid.base.seed)
    end = tokenizer.eos_token_id
    return llama(grid.model, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end), tokenizer


def train_base(grid: Grid, folder: Path, after_step: Callable[[int, float], None] = lambda step, loss: None) -> None:
    """Train the base and write model, tokenizer and base.json (losses, exam) to the folder, whole or not at all."""
    torch.set_num_threads(grid.workers * grid.threads)
    started, computed = time.perf_counter(), time.process_time()
    if grid.base.folder:
        model, tokenizer = load_causal_lm(Path(grid.base.folder), dtype="float32")
    else:
        model, tokenizer = fresh(grid)
    model.to(grid.device)
    read = material(grid, tokenizer)
    facts = world.world(grid.world.people, seed=grid.world.seed)
    told = token_stream(tokenizer, world.tell(facts, PASSES, seed=grid.base.seed))
    exam, cloze = exams(grid)
    before = answers(model, tokenizer, exam)
    part, sequence = grid.base, grid.train.sequence
    text = random_batches(read.base_text, max(part.batch - part.world, 1), sequence, seed=part.seed)
    about = random_batches(told, max(part.world, 1), sequence, seed=part.seed + 1)
    optimizer = adamw(model, part.learning_rate)
    losses = []
    for step, rate in enumerate(cosine_schedule(part.learning_rate, part.steps, warmup=part.warmup), start=1):
        set_learning_rate(optimizer, rate)
        batch = torch.cat([next(text), next(about)])[: part.batch].to(grid.device)
        losses.append(train_step(model, optimizer, batch))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the base's loss is {losses[-1]} at step {step}; lower base.learning_rate of the grid")
        after_step(step, losses[-1])
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "base": asdict(part),
        "losses": [round(loss, 4) for loss in losses],
        "validation": block_losses(model, blocks(grid, read), grid.device),
        "exam_before": before,
        "exam": answers(model, tokenizer, exam),
        "cloze": answers(model, tokenizer, cloze),
        "seconds": {
            "all": round(time.perf_counter() - started, 1),
            "cpu": round(time.process_time() - computed, 1),
        },
    }
    with staged_folder(folder, may_replace=lambda path: True) as staged:
        model.save_pretrained(staged)  # type: ignore[operator]
        tokenizer.save_pretrained(staged)
        torch.save(asdict(read), staged / MATERIAL)
        (staged / "base.json").write_text(json.dumps(row), encoding="utf-8")


def blocks(grid: Grid, read: Material) -> list[Tensor]:
    """Windows int64 [1, sequence] that lie evenly over the held-out text, at most as many as the grid asks for."""
    windows = consecutive_batches(read.held_out, 1, grid.train.sequence, most=len(read.held_out))
    return windows[:: max(1, len(windows) // grid.train.validation)][: grid.train.validation]


def answers(model: nn.Module, tokenizer: Any, items: list[Item]) -> str:
    """Right (1) and wrong (0) answers in the items' order, as one word."""
    found = score(model, tokenizer, items, batch=SCORED, autocast=torch.bfloat16)
    return "".join("1" if right else "0" for right in found.correct)


@torch.no_grad()
def block_losses(model: nn.Module, blocks: list[Tensor], device: str) -> list[float]:
    """The loss of each block int64 [1, sequence] in eval mode, under bf16 autocast; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return [
                round(float(model(input_ids=x, labels=x, use_cache=False).loss), 5)
                for x in (block.to(device) for block in blocks)
            ]
    finally:
        model.train(was_training)
