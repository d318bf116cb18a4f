"""What the runs are, and what happened in them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

from .contents import Contents
from .curves import key
from .html import MISSING, Markup, join, missing, shown, table, tag

DETAILS = ("config", "recipe", "data", "device", "versions")  # of run.json, to open below the table
EVENTS = 200  # of one run in the table


def runs_of(items: Sequence[Contents]) -> Markup:
    """A table of the runs; configuration and versions of each to open."""
    rows = []
    for item in items:
        info = item.run.info
        status = str(info.get("status") or MISSING)
        rows.append(
            [
                key(item),
                tag("span", status, class_="stopped") if status == "stopped" else status,
                info.get("reason") or MISSING,
                _recipe(info),
                _parameters(info.get("parameters")),
                _steps(item),
                _duration(info),
                info.get("baseline") or MISSING,
                str(item.run.path),
            ]
        )
    head = ("run", "status", "reason", "recipe", "parameters", "steps", "took", "baseline", "folder")
    details = []
    for item in items:
        info = item.run.info
        whole = {key: info[key] for key in DETAILS if info.get(key)}
        if whole:
            text = json.dumps(whole, indent=2, ensure_ascii=False)
            details.append(
                tag(
                    "details",
                    tag("summary", f"Configuration, recipe and versions of {item.label}"),
                    tag("pre", text, tabindex="0"),
                )
            )
        else:
            details.append(missing(f"{item.label} has no configuration in its run.json."))
    return join([table("From each run's run.json", head, rows, numbers=(4, 5, 6)), *details])


def happenings(items: Sequence[Contents]) -> Markup:
    """The events of each run."""
    parts = []
    for item in items:
        if not item.events:
            parts.append(missing(f"{item.label}: nothing happened."))
            continue
        rows = [
            [shown(row.get("step"), "g"), str(row.get("kind", MISSING)), str(row.get("text", MISSING))]
            for row in item.events[:EVENTS]
        ]
        rest = len(item.events) - EVENTS
        caption = item.label if rest <= 0 else f"{item.label}, the first {EVENTS} of {len(item.events)} events"
        parts.append(table(caption, ("step", "kind", "what"), rows))
    return join(parts)


def _recipe(info: dict[str, Any]) -> str:
    """The recipe's name and what was changed of it; as it prints where the configuration does not name one."""
    config = info.get("config")
    named = config.get("recipe") if isinstance(config, dict) else None
    if not named:
        return str(info.get("recipe") or "none: high precision")
    changes = config.get("recipe_changes") if isinstance(config, dict) else None
    changed = ", ".join(f"{key}={value}" for key, value in changes.items()) if isinstance(changes, dict) else ""
    return f"{named} with {changed}" if changed else str(named)


def _parameters(count: Any) -> str:
    if isinstance(count, dict):
        named = [
            f"{_parameters(value)} {str(name).replace('_', ' ')}" for name, value in count.items() if name != "all"
        ]
        return ", ".join(([_parameters(count["all"])] if "all" in count else []) + named)
    if not isinstance(count, int | float) or isinstance(count, bool):
        return MISSING
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:g}"


def _steps(item: Contents) -> str:
    planned = item.run.info.get("steps")
    made = item.log[-1].get("step") if item.log else None
    if made is None:
        return f"0 of {shown(planned, 'g')}"
    return shown(made, "g") if planned in (None, made) else f"{shown(made, 'g')} of {shown(planned, 'g')}"


def _duration(info: dict[str, Any]) -> str:
    try:
        began, ended = (datetime.datetime.fromisoformat(str(info.get(name))) for name in ("started", "finished"))
        seconds = int((ended - began).total_seconds())
    except (ValueError, TypeError):
        return MISSING
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
