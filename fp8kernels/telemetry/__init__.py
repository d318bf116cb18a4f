"""Reading the counters that always run, and looking at tensors now and then: tables, curves, alarms on saturation."""

from .alarm import CarrierWarning, SaturationError, SaturationWarning, check_saturation
from .meter import Meter
from .saturation import Measurement, SaturationStop, SaturationWatch
from .sinks import LogHandle, log_to
from .summary import LayerReport, report, sqnr_db, summary
from .tensors import TensorReading

__all__ = [
    "CarrierWarning",
    "LayerReport",
    "LogHandle",
    "Measurement",
    "Meter",
    "SaturationError",
    "SaturationStop",
    "SaturationWarning",
    "SaturationWatch",
    "TensorReading",
    "check_saturation",
    "log_to",
    "report",
    "sqnr_db",
    "summary",
]
