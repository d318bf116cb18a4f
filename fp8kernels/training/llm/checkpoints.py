"""Checkpoints that are there whole or not at all, and which of them are kept.

The trainer writes into a staging folder. Only when everything is written and on the disk, a list of the files with
their sizes goes beside them, and one rename makes the folder a checkpoint. A kill or a full disk before that leaves
the earlier checkpoints as they were; what was staged is removed at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ...export.atomic import write_file

NAME = "checkpoint-"
STAGING = ".staging"
FILES = "files.json"  # the last file of a checkpoint: every file's name and size in bytes
STATE = "detectors.json"  # what our callbacks carry on from


class CheckpointError(OSError):
    """A checkpoint could not be written, or is not whole."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{NAME}{step}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(NAME))


def staging(folder: Path) -> Path:
    """The folder that the trainer writes into."""
    return folder / STAGING


def begin(folder: Path) -> None:
    """Remove what an earlier process left half written."""
    shutil.rmtree(staging(folder), ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def end(folder: Path) -> None:
    """Remove the staging folder, and the folder of checkpoints if there is none in it."""
    shutil.rmtree(staging(folder), ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def seal(folder: Path, step: int) -> Path:
    """Turn a staged folder into the checkpoint of a step.

    returns  its path
    raises   OSError where the disk does not take it; the earlier checkpoints stay
    """
    staged, out = staging(folder) / f"{NAME}{step}", path_of(folder, step)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    for path in files:
        flush(path)
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    write_file(staged / FILES, lambda path: path.write_text(json.dumps(sizes, indent=1), encoding="utf-8"))
    if out.exists():  # of an earlier try at this step
        shutil.rmtree(out)
    staged.rename(out)
    flush_folder(folder)
    return out


def why_not_whole(path: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None if it is one."""
    listed = path / FILES
    if not listed.is_file():
        return f"it has no {FILES}, which is written last"
    try:
        sizes = json.loads(listed.read_text(encoding="utf-8"))
    except ValueError:
        return f"its {FILES} cannot be read"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, written were {size}"
    return None


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob(f"{NAME}*") if path.is_dir() and path.name.removeprefix(NAME).isdigit()]
    return [path for path in sorted(found, key=step_of) if why_not_whole(path) is None]


def broken(folder: Path) -> dict[Path, str]:
    """The folders that look like checkpoints and are not whole, with the reason."""
    found = sorted(path for path in folder.glob(f"{NAME}*") if path.is_dir())
    reasons = {path: why_not_whole(path) for path in found}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def rotate(folder: Path, *, keep: int, best: int | None) -> list[Path]:
    """Remove all whole checkpoints but the newest `keep` and the one of step `best`; returns what was removed."""
    found = whole(folder)
    gone = [path for path in found[:-keep] if step_of(path) != best]
    staging(folder).mkdir(parents=True, exist_ok=True)
    for path in gone:  # away in one step first: a kill leaves no half of a checkpoint
        shutil.rmtree(path.rename(staging(folder) / f"gone-{path.name}"))
    return gone


def write_state(path: Path, state: dict[str, Any]) -> None:
    """What our callbacks carry on from, as one JSON file of a checkpoint."""
    (path / STATE).write_text(json.dumps(state), encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote; nothing where there is no such file."""
    file = path / STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def flush(path: Path) -> None:
    """Have the disk take a file's bytes now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Have the disk take a folder's names now, where the system knows how."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
