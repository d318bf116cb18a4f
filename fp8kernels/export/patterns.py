"""Names of layers against the patterns of a config, which a stranger may have written.

A pattern is a name, or a regular expression after "re:". An expression can be made so that matching takes longer than
anybody waits; those are refused before they are used.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import sre_constants
    import sre_parse

REGEX = "re:"
LONGEST_PATTERN = 1000  # characters
LONGEST_NAME = 512  # characters of a tensor's name; those of real models have below 200
MOST_REPEATS = 3  # "*", "+" and "{2,5}" in one expression: time grows as the length of a name to this power
EACH = 16  # patterns between two looks at the clock
MOST_OPTIONAL = 8  # "?" in one expression: each may double the time
REPEATS = tuple(
    getattr(sre_constants, name)
    for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
    if hasattr(sre_constants, name)
)


@dataclass
class Patience:
    """How long many names may be held against many patterns; one of them alone takes milliseconds at most."""

    seconds: float = 20.0  # of this thread on a processor; thousands of layers and dozens of patterns take one
    start: float = field(default_factory=time.thread_time)

    def spend(self) -> None:
        """raises ValueError once the time is up."""
        if time.thread_time() - self.start > self.seconds:
            raise ValueError(
                f"the patterns of the config take more than {self.seconds:g} s for the names in the files; name layers "
                "in fewer and simpler patterns"
            )

    def all(self, patterns: Iterable[str]) -> Iterator[str]:
        """The patterns, one after the other.

        raises   ValueError once the time is up
        """
        for index, pattern in enumerate(patterns):
            if index % EACH == 0:
                self.spend()
            yield pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a layer, or its expression matches at the name's start.

    raises   ValueError for an expression that is none, or that could take for ever
    """
    if not pattern.startswith(REGEX):
        return pattern == name
    return compiled(pattern[len(REGEX) :]).match(name[:LONGEST_NAME]) is not None


@lru_cache(maxsize=1024)
def compiled(expression: str) -> re.Pattern[str]:
    """The expression, ready to match.

    raises   ValueError if it is too long, no regular expression, repeats what repeats or chooses, or repeats too often
    """
    if len(expression) > LONGEST_PATTERN:
        raise ValueError(
            f"the pattern {expression[:40]!r}… has {len(expression):,} characters, at most {LONGEST_PATTERN}"
        )
    try:
        repeats, optional = _repeats(sre_parse.parse(expression), within=False)
        if repeats > MOST_REPEATS or optional > MOST_OPTIONAL:
            raise ValueError(
                f"it repeats in {repeats} places and has {optional} optional parts, at most {MOST_REPEATS} and "
                f"{MOST_OPTIONAL}"
            )
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"the pattern {expression[:100]!r} is refused: {error}") from None


def _repeats(node: Any, *, within: bool) -> tuple[int, int]:
    """How many repeats and how many optional parts an expression has.

    raises   ValueError where one stands in a repeat, which holds a choice, or where a group is referred to
    """
    repeats = optional = 0
    for op, argument in node:
        inner, inside = [], within
        if op in REPEATS:
            if within:
                raise ValueError("it repeats what repeats, which can take for ever")
            many = argument[1] > 1
            repeats, optional = repeats + many, optional + (not many)
            inner, inside = [argument[2]], many
        elif op is sre_constants.BRANCH:
            if within:
                raise ValueError("it repeats a choice, which can take for ever")
            inner = argument[1]
        elif op in (sre_constants.GROUPREF, sre_constants.GROUPREF_EXISTS):
            raise ValueError("it refers back to a group")
        elif op is sre_constants.SUBPATTERN:
            inner = [argument[3]]
        elif op in (sre_constants.ASSERT, sre_constants.ASSERT_NOT):
            inner = [argument[1]]
        elif str(op) == "ATOMIC_GROUP":
            inner = [argument]
        for part in inner:
            more, options = _repeats(part, within=inside)
            repeats, optional = repeats + more, optional + options
    return repeats, optional
