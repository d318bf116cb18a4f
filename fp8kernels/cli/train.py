"""fp8kernels train …"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import mistakes

app = typer.Typer(help="Train a model in 8 bits, or in BF16 as the run to compare with.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train a model in 8 bits, or in BF16 as the run to compare with."""


@app.command()
def llm(
    config: Annotated[Path, typer.Argument(help="a YAML file; docs/LLM.md lists its keys")],
    out: Annotated[Path, typer.Option(help="the run's folder")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="a key of the config and its value: a.b=c")] = None,
    *,
    resume: Annotated[bool, typer.Option(help="go on from the newest whole checkpoint in the run's folder")] = False,
) -> None:
    """Train a causal language model of transformers, W8A8 or BF16."""
    from ..training.llm import read_config, train

    with mistakes():
        run = train(read_config(config, changes or []), out, resume=resume)
    if run.info["status"] != "done":
        typer.echo(f"{run.path} has stopped: {run.info['reason']}", err=True)
        raise typer.Exit(1)
    typer.echo(f"wrote {run.path}")
