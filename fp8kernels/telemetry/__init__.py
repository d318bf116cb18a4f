"""Reading the counters that always run: a summary per layer, the alarm on saturation, who leaves a carrier."""

from .alarm import CarrierWarning, SaturationError, SaturationWarning, check_saturation
from .summary import LayerReport, report, sqnr_db, summary

__all__ = [
    "CarrierWarning",
    "LayerReport",
    "SaturationError",
    "SaturationWarning",
    "check_saturation",
    "report",
    "sqnr_db",
    "summary",
]
