"""Deliberate faults: an exact piece of a function's source is replaced while a check runs."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple


class Edit(NamedTuple):
    """In the source of `function`, `old`, which stands there once, becomes `new`."""

    function: Callable[..., Any]
    old: str
    new: str


@contextmanager
def edited(edit: Edit) -> Iterator[None]:
    """The function runs with other code, whoever holds it; afterwards it is as before."""
    function: Any = inspect.unwrap(edit.function)
    source = textwrap.dedent(inspect.getsource(function))
    times = source.count(edit.old)
    assert times == 1, f"{function.__qualname__} has {edit.old!r} {times} times: the fault has to be written anew"
    names: dict[str, Any] = {}
    changed = source.replace(edit.old, edit.new)
    # annotations stay words, as in the module
    flags = __future__.annotations.compiler_flag
    exec(compile(changed, f"<fault in {function.__qualname__}>", "exec", flags), dict(function.__globals__), names)
    code, other = function.__code__, inspect.unwrap(names[function.__name__]).__code__
    assert other.co_freevars == code.co_freevars
    function.__code__ = other
    try:
        yield
    finally:
        function.__code__ = code


@contextmanager
def applied(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Several edits at once."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edited(edit))
        yield
