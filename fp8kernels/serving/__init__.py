"""Load an exported checkpoint and generate text with it, on transformers' own engine."""

from .generate import Run, generate
from .load import load, load_tokenizer
from .update import Updated, update

__all__ = ["Run", "Updated", "generate", "load", "load_tokenizer", "update"]
