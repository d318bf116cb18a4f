"""Runs that may be compared or continued: their configurations side by side, and the loss of a stored run by step."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ...runs import Run

PRECISION = ("recipe", "recipe_changes", "saturation", "probe")  # what a comparison is about, or only watches
HOUSEKEEPING = ("name", "baseline", "save_every", "keep", "log_every", "validate_every")
POLICY = ("saturation.policy", "probe.policy", "probe.drop", "probe.level")  # may change when a stopped run goes on


def differences(first: dict[str, Any], second: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, each as "key: first's value and second's"; keys and sections in `but` do not count."""
    one, other = _flat(first), _flat(second)
    return [
        f"{key}: {one.get(key)!r} and {other.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and not any(key == name or key.startswith(f"{name}.") for name in but)
    ]


def check_resume(run: Run, config: dict[str, Any], data: dict[str, Any], processes: int) -> None:
    """Whether a run may go on with a configuration and data.

    raises   ValueError naming the differences
    """
    changed = differences(run.info.get("config", {}), config, but=HOUSEKEEPING + POLICY)
    changed += data_differences(run.info.get("data", {}), data) + _processes(run, processes)
    if changed:
        raise ValueError(
            f"{run.path} was begun with other settings than those given now (then and now):\n  "
            + "\n  ".join(changed)
            + "\nresume with the settings of its run.json, or begin another run in a folder of its own"
        )


def read_baseline(path: Path, config: dict[str, Any], data: dict[str, Any], processes: int) -> dict[int, float]:
    """The loss of a BF16 run by step, if it can be compared with a run of this configuration.

    raises   FileNotFoundError if there is no run; ValueError naming what differs but the precision, or if it is no BF16
             run or has no losses
    """
    run = Run.open(path)
    theirs = run.info.get("config", {})
    if theirs.get("recipe") is not None:
        raise ValueError(f"baseline {path} was trained with recipe {theirs['recipe']!r}; a baseline is a BF16 run")
    differ = differences(theirs, config, but=PRECISION + HOUSEKEEPING) + data_differences(
        run.info.get("data", {}), data
    )
    differ += _processes(run, processes)
    if differ:
        raise ValueError(
            f"baseline {path} cannot be compared with this run: they differ in more than the precision (the baseline "
            "and this run):\n  " + "\n  ".join(differ)
        )
    losses = {row["step"]: row["loss"] for row in run.rows("log") if row.get("loss") is not None}
    if not losses:
        raise ValueError(f"baseline {path} has no losses in its log.jsonl")
    return losses


def data_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What says that two runs saw other tokens: the digests of their data."""
    parts = ("train", "validation")
    digests = [(part, (theirs.get(part) or {}).get("digest"), (ours.get(part) or {}).get("digest")) for part in parts]
    return [f"tokens of data.{part}: digest {a!s:.12} and {b!s:.12}" for part, a, b in digests if a != b]


def _processes(run: Run, ours: int) -> list[str]:
    """`batch` is of each process, so their number is part of the batch."""
    theirs = run.info.get("processes", 1)
    return [] if theirs == ours else [f"processes: {theirs} and {ours}"]


def near(name: str, known: list[str]) -> str:
    """A hint at the name that was meant, or nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
