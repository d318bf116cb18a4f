"""Reading the counters that always run: a summary per layer, curves, the alarm on saturation, who leaves a carrier."""

from .alarm import CarrierWarning, SaturationError, SaturationWarning, check_saturation
from .meter import Meter
from .sinks import LogHandle, log_to
from .summary import LayerReport, report, sqnr_db, summary

__all__ = [
    "CarrierWarning",
    "LayerReport",
    "LogHandle",
    "Meter",
    "SaturationError",
    "SaturationWarning",
    "check_saturation",
    "log_to",
    "report",
    "sqnr_db",
    "summary",
]
