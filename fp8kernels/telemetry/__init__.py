"""Reading the counters that always run: a summary per layer, and the alarm on saturation."""

from .alarm import SaturationError, SaturationWarning, check_saturation
from .summary import LayerReport, report, sqnr_db, summary

__all__ = ["LayerReport", "SaturationError", "SaturationWarning", "check_saturation", "report", "sqnr_db", "summary"]
