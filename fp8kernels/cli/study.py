"""fp8kernels study"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import mistakes


def study(
    grid: Annotated[
        Path | None, typer.Argument(help="a YAML grid; the one for two CPU cores where none is given")
    ] = None,
    out: Annotated[Path, typer.Option(help="where the runs go; what is there already is not run again")] = Path(
        "runs/study"
    ),
    *,
    quick: Annotated[
        bool, typer.Option(help="seconds instead of an hour: shows that everything runs, and no more")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="an experiment of the grid; may be given more than once")
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="run nothing: draw STUDY.md of this folder again from its study/rows.jsonl")
    ] = None,
) -> None:
    """Run the controlled experiments on scaling, each paired with its BF16 run, and draw their page."""
    from ..study import draw_again, run_study

    with mistakes():
        if redraw is not None:
            typer.echo(str(draw_again(redraw)))
        else:
            run_study(grid, out, quick=quick, only=tuple(only or ()))
