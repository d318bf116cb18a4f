"""What a model knows, asked while it trains: exam items, their scores, and a detector of forgetting."""

from .cloze import cloze_from_text
from .forgetting import Forgetting, ForgettingError, ForgettingWarning, Look
from .items import Item, read_items, write_items
from .score import Scores, score

__all__ = [
    "Forgetting",
    "ForgettingError",
    "ForgettingWarning",
    "Item",
    "Look",
    "Scores",
    "cloze_from_text",
    "read_items",
    "score",
    "write_items",
]
