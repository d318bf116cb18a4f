"""HTML from Python: what comes from files is text and is escaped, what these functions return is markup."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
MISSING = "–"  # a cell without a number


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: Any) -> Markup:
    """Any text as it is to be read, never as markup."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(clean(str(text))))


def clean(text: str) -> str:
    """The text without what HTML, XML or UTF-8 cannot hold: control characters, lone surrogates."""
    return FORBIDDEN.sub("?", text)


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; attributes without a value are left out, `class_` and `aria_label` mean class and aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Elements one after the other."""
    return Markup("\n".join(map(escape, parts)))


def missing(text: str) -> Markup:
    """A sentence in place of what is not there."""
    return tag("p", text, class_="missing")


def table(caption: str, head: Sequence[Any], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> Markup:
    """A table that scrolls within itself; `numbers` are the columns to align at the right."""

    def cell(column: int, value: Any, kind: str = "td", scope: str | None = None) -> Markup:
        return tag(kind, value, class_="number" if column in numbers else None, scope=scope)

    header = tag("thead", tag("tr", *(cell(n, value, "th", "col") for n, value in enumerate(head))))
    body = tag(
        "tbody",
        *(
            tag("tr", *(cell(n, v, "th" if n == 0 else "td", "row" if n == 0 else None) for n, v in enumerate(row)))
            for row in rows
        ),
    )
    inner = tag("table", tag("caption", caption), header, body)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def number(value: Any) -> float:
    """A number of a row; NaN where there is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def shown(value: Any, form: str = ".4g", unit: str = "") -> str:
    """A number as it is printed, or a dash."""
    x = number(value)
    return f"{printed(x, form)}{unit}" if math.isfinite(x) else MISSING


def printed(x: float, form: str) -> str:
    """A number in a format, without the sign of what is printed as zero."""
    text = f"{x:{form}}"
    return text if any(c in "123456789" for c in text) else text.replace("-", "")


def between(low: Any, high: Any, form: str = ".2f", unit: str = "") -> str:
    """An interval as it is printed, or a dash where it is not finite."""
    ends = number(low), number(high)
    return f"{printed(ends[0], form)} to {printed(ends[1], form)}{unit}" if all(map(math.isfinite, ends)) else MISSING
