"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

PIPED_WIDTH = 140  # characters; a pipe has no width of its own, and rich would take 80 and cut the columns


def console() -> Console:
    """A console on standard output, wide enough for tables also where it is not a terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)
