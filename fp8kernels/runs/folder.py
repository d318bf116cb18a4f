"""A run's folder: run.json says what it is, and one file of JSON lines for each kind of row grows beside it.

    run.json      name, config, recipe, versions, parameters, status, reason, steps, baseline, started, finished
    log.jsonl     a row each optimizer step: step, loss, learning_rate, tokens_per_second, the totals of telemetry, ape
    layers.jsonl  a row each layer and role, at the steps that were measured
    probe.jsonl   a row each time that the probe was asked
    events.jsonl  what happened: step, kind, text
    eval.json     what `fp8kernels eval` found
    checkpoints/  what training goes on from; model/: the trained model; tensorboard/

Rows are appended whole, and a line that a kill cut short is not read.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from ..export.atomic import write_file

INFO = "run.json"
KINDS = ("log", "layers", "probe", "events")
STATUS = ("running", "done", "stopped")


class Run:
    """One run's folder.

    path   the folder
    info   what run.json says
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info = path, info

    @classmethod
    def create(cls, path: Path | str, **fields: Any) -> Run:
        """Begin a run in a new or empty folder; `fields` go into run.json.

        raises   FileExistsError if the folder holds a run already
        """
        path = Path(path)
        cls.refuse_used(path)
        run = cls(path, {})
        run.update(**({"name": path.name, "status": "running", "reason": None, "started": now()} | fields))
        return run

    @staticmethod
    def refuse_used(path: Path) -> None:
        """What `create` asks of a folder, for those who have minutes of loading before it.

        raises   FileExistsError if there is a run, or anything else
        """
        if (path / INFO).exists():
            raise FileExistsError(f"{path} holds a run already; resume it, or give another folder")
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(f"{path} exists and holds no run; give another folder, or empty this one")

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """A run that is there.

        raises   FileNotFoundError if the folder holds none; ValueError if its run.json cannot be read
        """
        path = Path(path)
        file = path / INFO
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no run: there is no {INFO} in it; `fp8kernels train` makes one")
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if not isinstance(info, dict):
            raise ValueError(f"{file} holds {type(info).__name__}, a run's holds an object")
        return cls(path, info)

    def update(self, **fields: Any) -> None:
        """Change what run.json says; whole or not at all.

        raises   ValueError for a status that there is not
        """
        if fields.get("status", "running") not in STATUS:
            raise ValueError(f"status={fields['status']!r} is none of {STATUS}")
        info = self.info | fields
        text = json.dumps(plain(info), indent=1) + "\n"
        _write(self.path / INFO, text)
        self.info = info

    def finish(self, status: str, reason: str | None = None) -> None:
        """The run is over: "done", or "stopped" and why."""
        self.update(status=status, reason=reason, finished=now())

    def file(self, kind: str) -> Path:
        """Where the rows of a kind lie.

        raises   ValueError for a kind that there is not
        """
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of row; there are {', '.join(KINDS)}")
        return self.path / f"{kind}.jsonl"

    def append(self, kind: str, *rows: dict[str, Any]) -> None:
        """Add rows, each as one line, and hand them to the disk. Numbers that are not finite become null."""
        if not rows:
            return
        text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
        with self.file(kind).open("a", encoding="utf-8") as file:
            file.write(text)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """All rows of a kind, in order; none if there is no such file. A last line without its end is left out.

        raises   ValueError naming the line that is no JSON object
        """
        path = self.file(kind)
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
        whole, _, _ = text.rpartition("\n")
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a row: {line[:80]!r}")
            rows.append(row)
        return rows

    def cut(self, step: int) -> None:
        """Forget the rows after a step, which a resumed run makes again; what a kill left half written goes too."""
        for kind in KINDS:
            if not self.file(kind).is_file():
                continue
            kept = [row for row in self.rows(kind) if row.get("step", 0) <= step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            _write(self.file(kind), text)


def plain(value: Any) -> Any:
    """A value as JSON holds it: paths as text, tuples as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None | bool):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a scalar of numpy or torch
        return plain(value.item())
    return str(value)


def now() -> str:
    """The time, as run.json holds it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _write(path: Path, text: str) -> None:
    write_file(path, lambda staged: staged.write_text(text, encoding="utf-8"))
