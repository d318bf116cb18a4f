"""Walk a model, replace what can be 8-bit, and say what was not and why."""

from .convert import convert, revert
from .decide import Decision, decide
from .fuse import Fusion, plan_fusion

__all__ = ["Decision", "Fusion", "convert", "decide", "plan_fusion", "revert"]
