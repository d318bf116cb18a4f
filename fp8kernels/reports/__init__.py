"""One self-contained HTML page about one or several runs: curves, layers over time, knowledge, what happened."""

from __future__ import annotations

from .page import write_report

__all__ = ["write_report"]
