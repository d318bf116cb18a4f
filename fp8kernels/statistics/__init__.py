"""What two runs differ by, and how sure that is: curves in percent, bootstrap intervals, paired answers. numpy only."""

from .answers import McNemar, Paired, mcnemar, paired
from .bootstrap import Interval, bootstrap_difference, bootstrap_mean
from .curves import ape, signed_error_percent
from .decisions import Statement, equivalence, holm, minimal_detectable_drop

__all__ = [
    "Interval",
    "McNemar",
    "Paired",
    "Statement",
    "ape",
    "bootstrap_difference",
    "bootstrap_mean",
    "equivalence",
    "holm",
    "mcnemar",
    "minimal_detectable_drop",
    "paired",
    "signed_error_percent",
]
