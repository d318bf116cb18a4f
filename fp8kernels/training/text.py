"""Real text that every Python carries: the sources of its own standard library.

The choice of files, their order and the split depend on the installed Python alone, so two runs see the same text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "encodings",
        "lib2to3",
        "distutils",
        "tkinter",
        "turtledemo",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "__pycache__",
        "idle_test",
        "config",
        "__phello__",
    ]
)  # tests, tables and graphical tools: often not installed, and little like prose or code
HELD_OUT = 16  # one file in so many is kept for validation
SHORTEST_FILE = 200  # bytes; below it there is an import or nothing
LONGEST_FILE = 60_000  # bytes; one huge generated module should not fill the corpus
SENTENCE_WORDS = (7, 28)  # shorter ones say little, longer ones are mostly lists


@functools.cache  # the library does not change while it is running
def library_files() -> tuple[Path, ...]:
    """The .py files of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    chosen = sorted(
        (path for path in files if SHORTEST_FILE < path.stat().st_size <= LONGEST_FILE),
        key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(),
    )
    return tuple(chosen)


def split_text(limit_bytes: int) -> tuple[list[str], list[str]]:
    """The text of the training files and of the held-out files, about `limit_bytes` of it, no file in both.

    raises   FileNotFoundError where the sources of the standard library are not installed
    """
    training: list[str] = []
    held_out: list[str] = []
    read = 0
    for index, path in enumerate(library_files()):
        text = path.read_text(encoding="utf-8", errors="replace")
        (held_out if index % HELD_OUT == 0 else training).append(text)
        read += len(text)
        if read >= limit_bytes:
            break
    if not training or not held_out:
        root = sysconfig.get_paths()["stdlib"]
        raise FileNotFoundError(f"no .py sources of the standard library under {root}; install them, or another Python")
    return training, held_out


def sentences(count: int) -> list[str]:
    """`count` different whole sentences from the docstrings of the standard library, always the same ones.

    raises   ValueError if the library holds fewer
    """
    found: dict[str, None] = {}  # ordered, without repeats
    for path in library_files():
        for sentence in _sentences_of(path):
            found.setdefault(sentence)
            if len(found) == count:
                return list(found)
    raise ValueError(f"the standard library's docstrings hold {len(found)} sentences, {count} were asked for")


def _sentences_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a library may hold files for other versions
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                yield from filter(_is_prose, re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split())))


def _is_prose(sentence: str) -> bool:
    fewest, most = SENTENCE_WORDS
    words = sentence.split()
    return (
        fewest <= len(words) <= most
        and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'()\-]*[.]", sentence) is not None
        and sum(word.strip(",;:'().").isalpha() and word.islower() for word in words[1:]) >= 0.7 * (len(words) - 1)
    )
