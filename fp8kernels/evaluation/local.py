"""Tasks for lm-evaluation-harness from what is at hand: exam items, and plain text in paired blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..export.atomic import write_file
from ..probe import Item

PIECE = 2048  # characters of a block of text, about 512 tokens: enough blocks to pair, long enough for context
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
}
CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}


def write_items_task(items: Sequence[Item], folder: Path | str, name: str) -> list[str]:
    """Exam items as tasks of lm-eval, which gives them the same answers as `probe.score`.

    folder   gets NAME.yaml and NAME.jsonl for multiple choice, NAME_cloze.yaml and .jsonl for cloze items
    returns  the names of the tasks
    raises   ValueError if there are no items
    """
    if not items:
        raise ValueError(f"there are no items for the task {name!r}")
    names = []
    for kind, task, config in (("choice", name, CHOICE), ("cloze", f"{name}_cloze", CLOZE)):
        rows = [
            {"prompt": item.prompt, "choices": list(item.choices), "answer": item.answer}
            for item in items
            if item.kind == kind
        ]
        if rows:
            names.append(_write_task(task, rows, config | {"target_delimiter": ""}, Path(folder)))
    return names


def write_text_task(path: Path | str, folder: Path | str, name: str | None = None) -> str:
    """A text file as a task of lm-eval: blocks of whole lines, each predicted on its own, in bits per byte.

    folder   gets NAME.yaml and NAME.jsonl
    name     None: text_ and the file's name
    returns  the name of the task
    raises   FileNotFoundError, ValueError for a file that is not there, empty or no UTF-8 text
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text {path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    pieces = blocks(text)
    if not pieces:
        raise ValueError(f"{path} holds no text")
    return _write_task(name or f"text_{path.stem}", [{"text": piece} for piece in pieces], TEXT, Path(folder))


def blocks(text: str, length: int = PIECE) -> list[str]:
    """Text in blocks of at most `length` characters, cut behind a line where there is one, without empty blocks."""
    pieces, start = [], 0
    while start < len(text):
        end = min(start + length, len(text))
        line = text.rfind("\n", start, end) + 1
        if end < len(text) and line > start:
            end = line
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


def _write_task(name: str, rows: list[dict[str, Any]], config: dict[str, Any], folder: Path) -> str:
    import yaml

    data = folder / f"{name}.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(data, lambda staged: staged.write_text(text, encoding="utf-8"))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data.name}},
        "test_split": "test",
        **config,
        "metadata": {"version": 1.0},
    }
    yaml_text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    write_file(folder / f"{name}.yaml", lambda staged: staged.write_text(yaml_text, encoding="utf-8"))
    return name
