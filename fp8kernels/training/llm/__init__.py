"""Training causal language models: one configuration, one run folder."""

from __future__ import annotations

from .config import Config, read_config
from .run import train

__all__ = ["Config", "read_config", "train"]
