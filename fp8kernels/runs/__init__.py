"""What a training run leaves behind: a folder of rows that reports, evaluations and later runs read."""

from __future__ import annotations

from .folder import Run

__all__ = ["Run"]
