"""Load an exported checkpoint and generate text with it, on transformers' own engine."""

from .generate import Run, generate
from .load import load, load_tokenizer

__all__ = ["Run", "generate", "load", "load_tokenizer"]
