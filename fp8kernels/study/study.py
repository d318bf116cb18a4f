"""The whole study: base, runs in a few processes, rows, page. What a folder holds already is not run again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..console import console
from ..models.llama import LlamaSize, llama
from ..training.step import adamw, train_step
from .base import quiet, train_base
from .grid import BasePart, Grid, TextPart, TrainPart, WorldPart, read_grid
from .page import ROWS, write_page
from .ranks import on_ranks
from .rows import Row, Study, read_row, run_path, study, write_json, write_study
from .run import Task, run
from .settings import Settings

SHARED = ("model", "world", "text", "base", "train", "threads", "device")  # what all runs of a folder have in common
TOLD = 20  # lines that a log gets of the base's training
TIMED = 3  # steps, after one that is not


def run_study(grid: Path | None, out: Path, *, quick: bool = False, only: tuple[str, ...] = ()) -> Study:
    """Run what is missing of a study and write study/rows.jsonl, STUDY.md and its figures to the folder.

    grid     a YAML file (grid.py); None is the one for two CPU cores
    out      the study's folder; runs that it holds are kept, each is written whole or not at all
    quick    tiny sizes and one seed: shows in seconds that everything runs, its numbers mean nothing
    only     names of experiments; the others are left out
    raises   FileNotFoundError or ValueError for a wrong grid, or a folder that holds another study
    """
    quiet()
    todo = read_grid(grid)
    if quick:
        todo = small(todo)
    if todo.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("the grid asks for device: cuda, and torch sees none here; give device: cpu, or another grid")
    runs = todo.runs(only)
    settle(todo, out)
    waiting = [(settings, seed) for settings, seed in runs if read_row(run_path(out, settings, seed)) is None]
    if waiting:
        console().print(budget(todo, waiting, base=not (out / "base" / "base.json").is_file()))
    with _progress() as progress:
        make_base(todo, out, progress)
        make_runs(todo, out, waiting, progress, done=len(runs) - len(waiting))
    made = collect(todo, out, runs)
    write_study(out / ROWS, made)
    page = write_page(made, out)
    console().print(f"{len(runs)} runs; the page is {page}")
    return made


def small(grid: Grid) -> Grid:
    """The same experiments at a size of seconds."""

    steps = 18

    def short(settings: Settings) -> Settings:
        if settings.precision == "bf16":
            return settings
        return replace(settings, warmup_steps=min(settings.warmup_steps // 4, steps // 2))

    return replace(
        grid,
        centre=short(grid.centre),
        experiments={name: tuple(map(short, variants)) for name, variants in grid.experiments.items()},
        model=LlamaSize(vocab=320, hidden=16, intermediate=32, layers=3, heads=2, context=64),
        seeds=grid.seeds[:1],
        workers=1,
        device=grid.device if torch.cuda.is_available() else "cpu",
        world=WorldPart(people=4),
        text=TextPart(bytes=400_000),
        base=BasePart(steps=3, batch=4, world=2, warmup=1),
        train=TrainPart(steps=steps, batch=8, sequence=16, rise=2, validation=4, spike_step=16),
    )


def settle(grid: Grid, out: Path) -> None:
    """Write down the grid of a new folder.

    raises   ValueError if the folder holds runs that others cannot be compared with
    """
    now = json.loads(json.dumps(asdict(grid)))
    before = read_row(out / "grid.json")
    if before is not None:
        other = [name for name in SHARED if before.get(name) != now[name]]
        if other:
            raise ValueError(
                f"{out} holds a study with another "
                + ", ".join(f"{name} ({before.get(name)}, now {now[name]})" for name in other)
                + "; give another folder with --out"
            )
    write_json(out / "grid.json", now)


def budget(grid: Grid, waiting: list[tuple[Settings, int]], *, base: bool) -> str:
    """How long it will take on this machine, from a few steps of a model of the size."""
    if grid.base.folder:
        return f"{len(waiting)} runs of {grid.train.steps} steps, {grid.workers} at a time"
    torch.set_num_threads(grid.threads)
    model = llama(grid.model, tie_word_embeddings=True).to(grid.device)
    optimizer = adamw(model, 1e-4)
    tokens = torch.randint(grid.model.vocab, (grid.train.batch, grid.train.sequence), device=grid.device)
    train_step(model, optimizer, tokens)
    started = time.perf_counter()
    for _ in range(TIMED):
        train_step(model, optimizer, tokens)
    seconds = (time.perf_counter() - started) / TIMED
    minutes = len(waiting) * grid.train.steps * seconds / grid.workers / 60
    if base:
        share = grid.base.batch / grid.train.batch / (grid.workers if grid.device == "cpu" else 1)
        minutes += grid.base.steps * seconds * share / 60
    return (
        f"{len(waiting)} runs of {grid.train.steps} steps, {grid.workers} at a time: about {minutes:.0f} minutes of "
        f"training in BF16 on this machine, by {TIMED} steps of {seconds:.2f} s; HiF8 and the exams come on top"
    )


def make_base(grid: Grid, out: Path, progress: Progress) -> None:
    """Train the base, in a process of its own, if the folder has none."""
    if (out / "base" / "base.json").is_file():
        return
    bar = progress.add_task("base", total=grid.base.steps, note="")
    losses: list[float] = []

    def after_step(step: int, loss: float) -> None:
        losses.append(loss)
        note = f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}"
        progress.update(bar, completed=step, note=note)
        if step % max(1, grid.base.steps // TOLD) == 0:
            tell(f"base: step {step} of {grid.base.steps}, {note}")

    train_base(grid, out / "base", after_step)
    row = read_row(out / "base" / "base.json") or {}
    progress.update(bar, note=f"exam {row['exam'].count('1') / len(row['exam']):.1%}")


def make_runs(grid: Grid, out: Path, waiting: list[tuple[Settings, int]], progress: Progress, *, done: int) -> None:
    """Do the runs, a few at a time; each row is written when it is there, so that nothing is lost on a kill."""
    if not waiting:
        return
    bar = progress.add_task("runs", total=done + len(waiting), completed=done, note="")
    there = itertools.count(done + 1)

    def finish(name: str) -> None:
        progress.update(bar, advance=1, note=name)
        tell(f"run {next(there)} of {done + len(waiting)}: {name}")

    if grid.workers == 1:
        for settings, seed in waiting:
            finish(do(Task(grid, settings, seed, out / "base"), out))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(grid.workers, len(waiting)), mp_context=context) as pool:
        try:
            left = {pool.submit(do, Task(grid, settings, seed, out / "base"), out) for settings, seed in waiting}
            while left:
                finished, left = wait(left, return_when=FIRST_COMPLETED)
                for future in finished:
                    finish(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def tell(line: str) -> None:
    """Progress for a log, where there is no terminal for a bar."""
    if not console().is_terminal:
        console().print(line, soft_wrap=True)


def do(task: Task, out: Path) -> str:
    """One run in this process, or in as many as it has ranks; writes its row and returns its name."""
    count = task.settings.ranks
    row = run(task) if count == 1 else on_ranks(count, run, task)
    write_json(run_path(out, task.settings, task.seed), row)
    return str(row["name"])


def collect(grid: Grid, out: Path, runs: list[tuple[Settings, int]]) -> Study:
    """The rows that the folder holds of these runs."""
    rows = [row for settings, seed in runs if (row := read_row(run_path(out, settings, seed))) is not None]
    base = read_row(out / "base" / "base.json") or {}
    return study(json.loads(json.dumps(asdict(grid))) | {"made": machine()}, base, rows)


def machine() -> Row:
    """With what the numbers were made: they are the same again on the same machine."""
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _progress() -> Any:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(),
    )
