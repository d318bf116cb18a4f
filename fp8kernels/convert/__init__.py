"""Walk a model, replace what can be 8-bit, and say what was not and why."""

from .convert import convert, revert
from .fuse import Fusion, plan_fusion
from .plan import Decision, plan

__all__ = ["Decision", "Fusion", "convert", "plan", "plan_fusion", "revert"]
