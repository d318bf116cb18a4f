"""A user's mistake is one clear line and exit code 2, not a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

MISTAKES = (ValueError, OSError, ImportError)  # what the library raises for bad input, missing files, missing packages


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Print what the library says about bad input, and leave with exit code 2."""
    try:
        yield
    except MISTAKES as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
