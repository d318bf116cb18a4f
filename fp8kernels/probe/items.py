"""Exam items, and files of them: one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..export.atomic import write_file

KINDS = ("choice", "cloze")
SHOWN = 10  # bad lines that an error lists


@dataclass(frozen=True)
class Item:
    """A question with its answer.

    prompt   what the model reads
    choices  what may follow, exactly as it would stand in a text: a space between belongs to the choice
    answer   the place of the right one in choices, from 0
    kind     "choice": is the right one the likeliest? "cloze": does the model, left to itself, write the only choice?
    raises   ValueError naming the field and what it holds
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    kind: str = "choice"

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt is {self.prompt!r}; it must be text")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence):
            raise ValueError(f"choices is {self.choices!r}; it must be a list of texts")
        object.__setattr__(self, "choices", tuple(self.choices))
        for place, choice in enumerate(self.choices):
            if not isinstance(choice, str) or not choice:
                raise ValueError(f"choices[{place}] is {choice!r}; it must be text, and not empty")
        if self.kind == "cloze" and len(self.choices) != 1:
            raise ValueError(f"choices holds {len(self.choices)} texts; an item of kind 'cloze' has one, its answer")
        if self.kind == "choice" and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"choices is {list(self.choices)}; it must hold two texts or more, none of them twice")
        if not isinstance(self.answer, int) or isinstance(self.answer, bool):
            raise ValueError(f"answer is {self.answer!r}; it must be the place of the right choice, from 0")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer is {self.answer}; it must be between 0 and {len(self.choices) - 1}")


def read_items(path: Path | str) -> list[Item]:
    """The items of a file of JSON lines with the fields of `Item`; answer and kind may be left out of a cloze item.

    raises   FileNotFoundError; ValueError that names each bad line (the first ten), its field and the reason, or says
             that the file holds no item, or no text
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file of probe items")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}); probe items are JSON lines") from None
    items, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(line))
            except ValueError as error:
                bad.append(f"line {number}: {error}")
    if bad:
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise ValueError("\n  ".join([f"{path}: {len(bad)} bad of {len(items) + len(bad)} items", *bad[:SHOWN], *more]))
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def write_items(path: Path | str, items: Iterable[Item]) -> None:
    """Write items as JSON lines that `read_items` reads; the file is whole or stays as it was."""
    text = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
    write_file(Path(path), lambda staged: staged.write_text(text, encoding="utf-8"))


def digest(items: Sequence[Item]) -> str:
    """16 hexadecimal digits that change with any item and with their order."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()[:16]


def _item(line: str) -> Item:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}; an item is an object with the fields prompt, choices, answer, kind")
    known = [field.name for field in fields(Item)]
    if unknown := [name for name in row if name not in known]:
        raise ValueError(f"unknown field {unknown[0]!r}; an item has {', '.join(known)}")
    if missing := [name for name in ("prompt", "choices") if name not in row]:
        raise ValueError(f"field {missing[0]!r} is missing")
    if "answer" not in row and row.get("kind") != "cloze":
        raise ValueError("field 'answer' is missing: the place of the right choice, from 0")
    return Item(**row)
