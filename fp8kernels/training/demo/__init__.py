"""The main job, end to end on real input: pre-trained weights in 8 bits, QAT beside BF16, serving in a new process."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...console import console
from . import report, sentences, serve, train
from .size import FULL, QUICK, DemoSize

__all__ = ["FULL", "QUICK", "DemoSize", "run_demo"]


def run_demo(out: str | Path = "runs/demo", *, quick: bool = False) -> dict[str, Any]:
    """Run the demo, print one table, and leave loss.png, results.json and two checkpoints in `out`.

    quick    a tiny model and a few sentences: whether all of it works, not how well
    returns  what results.json holds
    raises   ImportError naming the extra to install; FileExistsError if `out` holds foreign folders of the same names
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    _quiet()
    size, out = QUICK if quick else FULL, Path(out)
    started = time.perf_counter()
    screen = console()
    with Progress(
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=screen
    ) as progress:
        bar = _Bars(progress)
        embedded = sentences.run(size, bar.start("1. sentences: loading MiniLM", sentences.steps(size)))
        advance = bar.start("2. reading the standard library", 1)
        text = train.prepare(size)
        advance("2. tokens ready")
        trained = train.run(size, text, bar.start("2. training", train.steps(size)))
        advance = bar.start("3. serving", serve.steps(size))
        served = serve.run(trained.plain, trained.qat, trained.tokenizer, size, out, advance)
    found = report.results(embedded, trained, served, size)
    found["seconds"] = time.perf_counter() - started
    report.plot(trained, out / "loss.png")
    report.write_results(found, out / "results.json")
    screen.print(report.table(embedded, trained, served, size))
    _print_text(screen, served)
    screen.print(
        f"{found['seconds']:.0f} s. Loss curves: {out / 'loss.png'}. Numbers: {out / 'results.json'}. "
        f"8-bit checkpoint: {out / 'model-hif8'}\n"
        f"It goes on from any prompt: python -m fp8kernels generate {out / 'model-hif8'} --prompt 'def __init__(self'",
        soft_wrap=True,
    )
    return found


class _Bars:
    """One bar after the other; each is advanced by a call that says what it is at."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def start(self, description: str, total: int) -> Any:
        task = self.progress.add_task(description, total=total)
        part = description[:3]

        def advance(at: str) -> None:
            self.progress.update(task, advance=1, description=part + at.removeprefix(part))

        return advance


def _print_text(screen: rich.console.Console, served: list[serve.ServingResult]) -> None:
    for result in served:
        screen.print(f"[bold]{result.precision} continues the prompt:[/]")
        screen.print(result.text, markup=False, highlight=False, style="dim")


def _quiet() -> None:
    """Bars and remarks of other libraries would run through ours."""
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
