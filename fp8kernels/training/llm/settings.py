"""A nested dictionary into dataclasses: unknown keys and wrong types are errors that name the key and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def parse(kind: type[T], values: Any, where: str, *, folder: Path | None = None) -> T:
    """A dataclass from a dictionary, with its defaults for what is not given.

    kind    the dataclass; its fields are checked by their types, and may be dataclasses themselves
    where   what messages call the dictionary: "" at the top, then "data", "model.size" and so on
    folder  what relative paths are relative to
    raises  ValueError naming the key: unknown (with the near match), missing, or of another type
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the configuration'} is {_shown(values)}, it must hold keys and values")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(unknown(_join(where, str(key)), str(key), list(known)))
    out: dict[str, Any] = {}
    for name, field in known.items():
        if name in values:
            out[name] = _value(hints[name], values[name], _join(where, name), folder)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(where, name)} is missing")
    try:
        return kind(**out)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def unknown(shown: str, key: str, known: list[str]) -> str:
    """What to say of a key that there is not."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {shown!r}; {hint}"


def set_value(values: dict[str, Any], assignment: str, read: Any) -> None:
    """Carry out "a.b=value" on a nested dictionary, in place; `read` makes a value of the text.

    raises   ValueError for a text without "=", or a path through something that has no keys
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ValueError(f"--set {assignment!r}: write it as key=value, for instance --set data.sequence=512")
    *parents, last = path.strip().split(".")
    here = values
    for key in parents:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise ValueError(f"--set {assignment!r}: {key!r} is {_shown(here)} and has no keys")
    here[last] = read(text)


def _value(hint: Any, value: Any, where: str, folder: Path | None) -> Any:
    """One value of a type hint: dataclass, list, tuple, dict, Optional, Path, str, int, float, bool or Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            if type(None) in arguments:
                return None
            raise ValueError(f"{where} must not be null")
        return _first(tuple(kind for kind in arguments if kind is not type(None)), value, where, folder)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where, folder=folder)
    if origin is list or origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        made = [_value(arguments[0], item, f"{where}[{number}]", folder) for number, item in enumerate(items)]
        if origin is tuple and Ellipsis not in arguments and len(made) != len(arguments):
            raise ValueError(f"{where} is {_shown(value)}, it holds {len(arguments)} values")
        return made if origin is list else tuple(made)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_shown(value)}, it must hold keys and values")
        return dict(value)
    return _scalar(hint, value, where, folder)


def _first(kinds: tuple[Any, ...], value: Any, where: str, folder: Path | None) -> Any:
    """The value by the first of several types that takes it; with one type, its own error."""
    if len(kinds) == 1:
        return _value(kinds[0], value, where, folder)
    try:
        return _value(kinds[0], value, where, folder)
    except ValueError as error:
        if not isinstance(value, list | tuple | dict) and len(kinds) == 2:
            raise ValueError(f"{error}, or a list") from None
        return _first(kinds[1:], value, where, folder)


def _scalar(hint: Any, value: Any, where: str, folder: Path | None) -> Any:
    if hint is float and isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path) and str(value):
        path = Path(value).expanduser()
        return path if path.is_absolute() or folder is None else folder / path
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
    raise ValueError(f"{where} is {_shown(value)}, it must be {names.get(hint, hint)}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
