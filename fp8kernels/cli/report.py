"""fp8kernels report RUN…"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import mistakes


def report(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs; the first is compared with, where none says")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
) -> None:
    """Draw one self-contained HTML page of one or several runs."""
    from ..reports import write_report
    from ..runs import Run

    with mistakes():
        page = write_report([Run.open(folder) for folder in folders], out)
    typer.echo(f"wrote {page}")
