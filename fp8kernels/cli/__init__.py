"""The commands: one file for each group, and `errors.py` for how bad input is told."""

from __future__ import annotations

from . import checkpoints, evaluate, report, serve, study, train
from .app import app

app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.command()(checkpoints.export)
app.command()(checkpoints.check)
app.command(context_settings={"allow_extra_args": True})(serve.serve)
app.command()(report.report)
app.command()(study.study)


def main() -> None:
    """The entry point of `fp8kernels` and `python -m fp8kernels`."""
    app()


__all__ = ["app", "main"]
