"""Writing so that a reader sees the old contents or the new, never half of either."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(out: Path, *, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends well, and is removed when it does not.

    out          where it is a symbolic link, the folder that it points to
    may_replace  whether an existing, non-empty `out` may be replaced; asked before anything is written
    raises       FileExistsError if it may not; whatever the block raises, also KeyboardInterrupt
    """
    out = Path(os.path.realpath(out))  # a link stays one, and "." has a name and a folder beside it
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not may_replace(out)):
        raise FileExistsError(f"{out} exists and was not written by export; give another folder, or empty this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        for path in staged.rglob("*"):
            _flush(path)
        _swap(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_file(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `out` that then takes the place of `out`; on any error `out` stays as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{os.getpid()}.partial.{out.name}")  # the suffix stays: some writers go by it
    try:
        write(staged)
        _flush(staged)
        staged.replace(out)
    finally:
        staged.unlink(missing_ok=True)


def _swap(staged: Path, out: Path) -> None:
    """Folders cannot replace each other in one step: the old one steps aside first, and back if that fails."""
    if not out.exists():
        staged.rename(out)
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(aside)
    try:
        staged.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk take the bytes now, so that a full disk is an error here and not a broken file later."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
