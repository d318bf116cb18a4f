"""fp8kernels eval …"""

from __future__ import annotations

import typer

app = typer.Typer(help="Score a model, paired with the one to compare with.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Score a model, paired with the one to compare with."""
