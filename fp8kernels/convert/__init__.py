"""Walk a model, replace what can be 8-bit, and say what was not and why."""

from .convert import convert, revert
from .plan import Decision, plan

__all__ = ["Decision", "convert", "plan", "revert"]
