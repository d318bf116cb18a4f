"""Documents from local files, one after another in a fixed order, read as they are asked for.

A source is a path or a glob pattern. What a file holds goes by its name, `.gz` after any of them:

    .jsonl, .ndjson        a record a line
    .json                  a list of records, or a record a line
    .parquet               a record a row
    a folder of `datasets` what `Dataset.save_to_disk` wrote: a record a row
    any other folder       its files, folder by folder in the order of their names, but nothing hidden (".git") and
                           no __pycache__
    anything else          UTF-8 text, the whole file one document

A record is taken by the first of these fields that it has: `input_ids` (already tokenized, with `labels` or
without), the text field, `messages` (a chat). Nothing else is left out: a file that cannot be read is an error. Text
files in folders may be empty (`__init__.py`); such a document is handed on, and counted by who reads it.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

IDS, LABELS, CHAT = "input_ids", "labels", "messages"
ROWS_AT_ONCE = 1024  # of a parquet file; bounds the memory, rows are long
SHOWN = 60  # characters of a bad line that an error shows


@dataclass(frozen=True)
class Document:
    """One document as it was found; one of text, messages and ids is there.

    where   its file, and its line or row (both from 1), for messages
    labels  as long as ids, or None: every token is learnt
    """

    where: str
    text: str | None = None
    messages: list[Any] | None = None
    ids: list[int] | None = None
    labels: list[int] | None = None


def read_documents(source: str | Path | Iterable[str | Path], text_field: str = "text") -> Iterator[Document]:
    """The documents of one source or of several, lazily: sources in the given order, files sorted by path, rows as
    they lie.

    raises   FileNotFoundError if nothing matches; ValueError naming the file and the line or row: nothing in a file
             or folder, bytes that are no text, broken JSON, a record without a field that can be read (with the
             fields that it has), a text that is no string, a parquet file or dataset that cannot be opened
    """
    for one in _listed(source):
        files, whole = files_of(one), False
        for path in files:
            document = None
            for document in _read(path, text_field):
                whole |= document.text != ""
                yield document
            if document is None:
                raise ValueError(f"{path} holds no document: there are no records in it")
        if not whole:
            raise ValueError(f"{one} holds no document: {'all its files are' if len(files) > 1 else 'it is'} empty")


def files_of(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files, and the folders of `datasets`, that the sources stand for, in the order in which they are read.

    raises   FileNotFoundError if a source matches nothing; ValueError for a folder without files
    """
    found: list[Path] = []
    for one in _listed(source):
        path = Path(one).expanduser()
        matches = {path} if path.exists() else {Path(match) for match in glob.glob(str(path), recursive=True)}
        roots = [match for match in sorted(matches) if matches.isdisjoint(match.parents)]  # "**" gives both
        files = [file for root in roots for file in _walk(root)]
        if roots and not files:
            raise ValueError(f"{one} is a folder without files to read")
        if not roots:
            raise FileNotFoundError(
                f"nothing matches {str(one)!r}; data are local files, folders or patterns such as 'texts/**/*.txt'. "
                "Data of a hub: load them once with `datasets` and give the folder that save_to_disk writes"
            )
        found += files
    return found


def _listed(source: str | Path | Iterable[str | Path]) -> list[str | Path]:
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise FileNotFoundError("no data were given; name files, folders or patterns")
    return sources


def _walk(path: Path) -> Iterator[Path]:
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = sorted(split.name for split in path.iterdir() if split.is_dir())
        raise ValueError(f"{path} holds several datasets: {', '.join(splits)}; give one of them")
    if not path.is_dir() or _is_saved_dataset(path):
        yield path
        return
    for inside in sorted(path.iterdir()):
        if not inside.name.startswith(".") and inside.name != "__pycache__":
            yield from _walk(inside)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _read(path: Path, text_field: str) -> Iterator[Document]:
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        rows = _saved_rows(path, text_field)
    elif name.endswith((".jsonl", ".ndjson")):
        rows = _json_lines(path)
    elif name.endswith(".json"):
        rows = _json_list(path) if _starts_with_bracket(path) else _json_lines(path)
    elif name.endswith(".parquet"):
        rows = _parquet_rows(path, text_field)
    else:
        yield Document(str(path), _whole_text(path))
        return
    for where, record in rows:
        yield _document(where, record, text_field)


def _document(where: str, record: Any, text_field: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds {_kind(record)}; a record is an object with the field {text_field!r}")
    if record.get(IDS) is not None:
        ids, labels = _numbers(where, record, IDS), None
        if record.get(LABELS) is not None:
            labels = _numbers(where, record, LABELS)
            if len(labels) != len(ids):
                raise ValueError(f"{where} has {len(ids)} {IDS} and {len(labels)} {LABELS}; a token has one label")
        return Document(where, ids=ids, labels=labels)
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: the field {text_field!r} holds {_kind(text)}, not text")
        _check_characters(where, text)
        return Document(where, text)
    if CHAT in record:
        messages = record[CHAT]
        if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
            raise ValueError(f"{where}: the field {CHAT!r} is not a list of objects with role and content")
        return Document(where, messages=messages)
    raise ValueError(f"{where} {_no_field(list(record), text_field)}")


def _no_field(there: list[str], text_field: str) -> str:
    near = difflib.get_close_matches(text_field, there, n=1) or [name for name in there if name.lower() in _USUAL][:1]
    hint = f"; set text_field to {near[0]!r}?" if near else "; set text_field to the one with the text"
    return f"has no field {text_field!r}. It has {', '.join(map(repr, there)) or 'none'}{hint}"


_USUAL = ("text", "content", "document", "body", "passage", "story")


def _numbers(where: str, record: dict[str, Any], field: str) -> list[int]:
    numbers = record[field]
    if not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        raise ValueError(f"{where}: the field {field!r} is not a flat list of whole numbers")
    return numbers


def _kind(value: Any) -> str:
    return {"NoneType": "null", "list": "a list", "dict": "an object", "int": "a number", "float": "a number"}.get(
        type(value).__name__, type(value).__name__
    )


def _whole_text(path: Path) -> str:
    with _open(path) as file:
        return _decoded(str(path), _bytes(path, file)).removeprefix("\ufeff")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        number = 0
        while line := _bytes(path, file, a_line=True):
            number += 1
            where = f"{path}, line {number}"
            text = _decoded(where, line).removeprefix("\ufeff" if number == 1 else "").strip()
            if text:
                yield where, _parsed(where, text)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parsed(str(path), _whole_text(path))
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _starts_with_bracket(path: Path) -> bool:
    with _open(path) as file:
        while line := _bytes(path, file, a_line=True):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                return line.startswith(b"[")
    return False


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}: {text[:SHOWN]!r}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _bytes(path: Path, file: IO[bytes], *, a_line: bool = False) -> bytes:
    try:
        return file.readline() if a_line else file.read()
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise ValueError(f"{path} cannot be unpacked: {error}") from None


def _decoded(where: str, raw: bytes) -> str:
    place = raw.find(b"\0")
    if place >= 0:
        raise ValueError(f"{where} is not text: there is a NUL byte at byte {place}; {_WAY_OUT}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}; {_WAY_OUT}") from None


_WAY_OUT = "convert it to UTF-8, or choose the files by a pattern such as 'texts/**/*.txt'"


def _check_characters(where: str, text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no character
            raise ValueError(f"{where}: the text has no UTF-8 form: {error.reason} at {error.start}") from None


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("a parquet file needs pyarrow: pip install 'fp8kernels[train]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, text_field)
            if not columns:
                raise ValueError(f"{path} {_no_field(file.schema_arrow.names, text_field)}")
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet after {number} rows: {error}") from None


def _saved_rows(path: Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise ImportError("a saved dataset needs datasets: pip install 'fp8kernels[train]'") from error
    try:
        rows = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a saved dataset: {error}") from None
    columns = _columns(rows.column_names, text_field)
    if not columns:
        raise ValueError(f"{path} {_no_field(rows.column_names, text_field)}")
    for number, record in enumerate(rows.select_columns(columns).with_format(None), 1):
        yield f"{path}, row {number}", record


def _columns(there: list[str], text_field: str) -> list[str]:
    wanted = (IDS, LABELS) if IDS in there else (text_field, CHAT)
    return [name for name in there if name in wanted]
