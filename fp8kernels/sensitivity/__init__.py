"""What each layer costs in 8 bits, and which ones to leave in high precision."""

from .plan import Plan, Sensitivity, plan

__all__ = ["Plan", "Sensitivity", "plan"]
