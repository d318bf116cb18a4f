"""What a model answered to the documents of one task, on disk and in memory, and how two of them are matched."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..export.atomic import write_file

SHOWN = 3  # documents that an error names


@dataclass(frozen=True)
class Document:
    """One answer.

    part    the subtask it belongs to, for groups such as MMLU; the task itself elsewhere
    number  of the document within the part
    stamp   hash of the document and of what the model was shown, so that only equal questions are compared
    values  metric to value: 0 or 1 for right or wrong; [log-likelihood in nats, bytes or words] for losses
    """

    part: str
    number: int
    stamp: str
    values: dict[str, Any]

    @property
    def place(self) -> tuple[str, int]:
        """What it is found by in the other model's answers."""
        return self.part, self.number


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one task.

    key    hash of the model's files, its precision and the task; answers kept under another key are not these
    cut    prompts that were longer than the model's context and lost their beginning
    """

    task: str
    key: str
    shots: int | None
    version: str
    documents: tuple[Document, ...]
    cut: int = 0

    def metrics(self) -> list[str]:
        """The metrics that each document has, in the task's order."""
        return list(self.documents[0].values) if self.documents else []


def save(answers: Answers, path: Path) -> None:
    """Write to a JSON file, whole or not at all."""
    text = json.dumps(asdict(answers)) + "\n"
    write_file(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def load(path: Path, key: str) -> Answers | None:
    """Answers that were kept, or None where there are none, they are damaged, or they are of another model or task."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        documents = tuple(Document(**document) for document in kept.pop("documents"))
        answers = Answers(documents=documents, **kept)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return answers if answers.key == key else None


def match(first: Answers, second: Answers) -> list[tuple[Document, Document]]:
    """The answers of two models to the same documents, in the order of the first model.

    raises   ValueError naming documents that only one was asked, that are not the same, or that occur twice
    """
    ours, theirs = _by_place(first), _by_place(second)
    lone = sorted(set(ours) ^ set(theirs))
    if lone:
        raise ValueError(
            f"task {first.task!r}: {len(ours)} and {len(theirs)} documents were answered, and {len(lone)} of them by "
            f"one model only ({_named(lone)}); only the same documents can be compared"
        )
    other = sorted(place for place in ours if ours[place].stamp != theirs[place].stamp)
    if other:
        raise ValueError(
            f"task {first.task!r}: {len(other)} of {len(ours)} documents are not the same for both models "
            f"({_named(other)}): the data, the shots or the chat template changed in between; evaluate both again"
        )
    return [(document, theirs[document.place]) for document in first.documents]


def numbers(pairs: list[tuple[Document, Document]], metric: str) -> tuple[list[float], list[float]]:
    """The values of a metric that is one number a document, of both models."""
    return [float(a.values[metric]) for a, _ in pairs], [float(b.values[metric]) for _, b in pairs]


def is_answer(documents: tuple[Document, ...], metric: str) -> bool:
    """Whether a metric is right or wrong in every document."""
    return all(not isinstance(d.values[metric], list) and d.values[metric] in (0, 1) for d in documents)


def is_loss(documents: tuple[Document, ...], metric: str) -> bool:
    """Whether a metric is a pair of a log-likelihood and what it is divided by, in every document."""
    return all(
        isinstance(value, list) and len(value) == 2 and all(math.isfinite(part) for part in value) and value[1] > 0
        for value in (document.values[metric] for document in documents)
    )


def _by_place(answers: Answers) -> dict[tuple[str, int], Document]:
    found = {document.place: document for document in answers.documents}
    if len(found) != len(answers.documents):
        raise ValueError(f"task {answers.task!r}: a document was answered twice; delete the kept answers")
    return found


def _named(places: list[tuple[str, int]]) -> str:
    names = ", ".join(f"{part} {number}" for part, number in places[:SHOWN])
    return names + (", …" if len(places) > SHOWN else "")
