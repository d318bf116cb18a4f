"""fp8kernels eval …"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import console
from .errors import mistakes

app = typer.Typer(help="Score a model, paired with the one to compare with.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Score a model, paired with the one to compare with."""


@app.command()
def llm(
    model: Annotated[Path, typer.Argument(help="a run's folder, or a model's that save_pretrained wrote")],
    tasks: Annotated[
        str, typer.Option(help="lm-eval's tasks or groups, or task files of your own: mmlu,arc_easy,my.yaml")
    ] = "",
    against: Annotated[
        Path | None, typer.Option(help="the run or model to compare with; else the run's baseline")
    ] = None,
    items: Annotated[list[Path] | None, typer.Option(help="a JSON-lines file of exam items")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="a text file, in bits per byte")] = None,
    include: Annotated[list[Path] | None, typer.Option(help="a folder of task files of your own")] = None,
    shots: Annotated[list[str] | None, typer.Option(help="examples before each question: 5, or mmlu=5")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="what a task is judged by: arc_easy=acc")] = None,
    fmt: Annotated[str | None, typer.Option("--format", help="bf16: without the 8-bit layers of a run")] = None,
    recipe: Annotated[str | None, typer.Option(help="8-bit layers for a model that was trained without them")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="text that sets the scales of --recipe")] = None,
    limit: Annotated[int | None, typer.Option(help="documents of each task, from the first; for a quick look")] = None,
    batch: Annotated[int, typer.Option(help="prompts at once")] = 8,
    margin: Annotated[float, typer.Option(help="a relative drop that would still count as no loss")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="where eval.json goes; else the run's folder")] = None,
    *,
    unpaired: Annotated[bool, typer.Option(help="plain scores, compared with nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what was found as one JSON object")] = False,
) -> None:
    """Ask a model and its BF16 reference the same documents, and compare them answer by answer."""
    from ..evaluation import Questions, evaluate, open_subject, reference_of
    from ..evaluation.evaluate import TRAIN_REFERENCE
    from ..evaluation.table import tables
    from ..evaluation.tasks import parse_metrics, parse_shots

    def say(line: str) -> None:
        typer.echo(line, err=True)

    with mistakes():
        subject = open_subject(model, fmt=fmt, recipe=recipe, calibrate=calibrate)
        named = None if unpaired else against or reference_of(subject.run)
        if named is None and not unpaired:
            raise ValueError(
                f"nothing to compare {model} with: {TRAIN_REFERENCE} with --against, or take --unpaired for plain "
                f"scores, which do not tell a small loss from chance"
            )
        all_shots, by_task = parse_shots(shots or ())
        questions = Questions(
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            include=include or (),
            items=items or (),
            text=text or (),
            shots=by_task,
            all_shots=all_shots,
            metrics=parse_metrics(metric or ()),
            limit=limit,
            batch=batch,
        )
        found = evaluate(
            subject, None if named is None else open_subject(named), questions, out=out, margin=margin, say=say
        )
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    screen = console()
    for table in tables(found):
        screen.print(table)
    for one in found.comparisons:
        if one.statement:
            screen.print(f"{one.task}: {one.statement}", highlight=False)
    if found.against is None:
        say("warning: unpaired scores; a difference between two such scores may be chance")
    for warning in found.warnings:
        say(f"warning: {warning}")
