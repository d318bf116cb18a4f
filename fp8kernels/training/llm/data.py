"""The data of a run: read, split, tokenized and laid out, the same for the same files and arguments."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blocks import Blocks
from .documents import Document, files_of, read_documents
from .packing import TooLong, pack


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it is validated on, if anything."""

    train: Blocks
    validation: Blocks | None


def load_data(
    train: str | Path | Iterable[str | Path],
    tokenizer: Any,
    *,
    sequence: int,
    validation: str | Path | Iterable[str | Path] = (),
    hold_out: float = 0.0,
    text_field: str = "text",
    packing: bool = True,
    too_long: TooLong = "split",
    context: int | None = None,
    vocab: int | None = None,
) -> Data:
    """Read, tokenize and pack the data of a run.

    hold_out   share of the training documents that is kept for validation where no `validation` is given; a hash of
               the document decides, so it stays on its side whatever else is added, and equal documents are on the
               same side
    the rest   see read_documents and pack
    raises     ValueError, also for a file that is in both, and for a hold_out that leaves one side without documents
    """
    train, validation = _listed(train), _listed(validation)
    if not 0 <= hold_out < 1:
        raise ValueError(f"hold_out={hold_out} is no share of the documents; it is from 0 up to, but not including, 1")
    if validation and hold_out:
        raise ValueError(f"hold_out={hold_out} and files for validation were given; it is one or the other")

    def packed(sources: list[str | Path], what: str, keep: Callable[[Document], bool] | None = None) -> Blocks:
        documents: Iterator[Document] = read_documents(sources, text_field)
        if keep is not None:
            documents = _some(filter(keep, documents), what, hold_out)
        return pack(
            documents,
            tokenizer,
            sequence,
            packing=packing,
            too_long=too_long,
            context=context,
            vocab=vocab,
            what=what,
        )

    if validation:
        files = {file.resolve() for file in files_of(train)}
        both = [file for file in files_of(validation) if file.resolve() in files]
        if both:
            raise ValueError(f"{both[0]} is in the training data and in the validation data; give hold_out instead")
        return Data(packed(train, "training"), packed(validation, "validation"))
    if not hold_out:
        return Data(packed(train, "training"), None)
    return Data(
        packed(train, "training", lambda document: not is_held_out(document, hold_out)),
        packed(train, "validation", lambda document: is_held_out(document, hold_out)),
    )


def _listed(source: str | Path | Iterable[str | Path]) -> list[str | Path]:
    return [source] if isinstance(source, str | Path) else list(source)


def _some(documents: Iterator[Document], what: str, share: float) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise ValueError(
            f"hold_out={share} leaves no document for {what}; "
            "give another share, more and smaller documents, or files for validation"
        )
    return itertools.chain([first], documents)


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the share that is kept for validation: by a hash of what it holds."""
    held = document.text if document.text is not None else repr(document.messages or document.ids)
    return int.from_bytes(hashlib.sha256(held.encode()).digest()[:8], "big") < share * 2**64
