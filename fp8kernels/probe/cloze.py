"""Cloze items from any held-out text: the last word of a sentence, or the last identifier of a line of code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from .items import Item

WORD = re.compile(r"[^\W\d]\w+")  # two characters or more, the first no digit
LAST = re.compile(r"(?P<word>[^\W\d]\w+)[^\w\s]*$")  # at the end of a sentence or line, punctuation behind it
END = re.compile(r"(?<=[.!?])\s+|\n+")
FEWEST_WORDS = 5  # in the sentence before the asked word; shorter ones leave too much open
MOST_CHARACTERS = 100_000  # of one document; the rest of a huge one would crowd out the others


def cloze_from_text(documents: Iterable[str], *, count: int = 200, context: int = 300) -> list[Item]:
    """At most `count` items of kind "cloze" from text that the model was not trained on during the run.

    The prompt ends before the last word of a sentence or line, and begins at most `context` characters earlier in the
    same document, at a word. Which sentences are taken depends on their text alone, so that the same documents give the
    same items, and no word is asked for twice after the same prompt.

    raises   ValueError if count or context are below 1, or if no sentence fits
    """
    if count < 1 or context < 1:
        raise ValueError(f"count={count} and context={context} characters must be at least 1")
    found: dict[tuple[str, str], bytes] = {}
    read = 0
    for document in documents:
        read += 1
        for prompt, word in _gaps(document[:MOST_CHARACTERS], context):
            found.setdefault((prompt, word), hashlib.sha256(f"{prompt}\0{word}".encode()).digest())
    if not found:
        raise ValueError(
            f"none of {read} documents has a sentence or line of more than {FEWEST_WORDS} words that ends in one"
        )
    chosen = sorted(found, key=found.__getitem__)[:count]
    return [Item(prompt, (word,), 0, "cloze") for prompt, word in chosen]


def _gaps(document: str, context: int) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of every sentence and line that qualifies; the space before a word belongs to the answer."""
    start = 0
    for end in [*(match.start() for match in END.finditer(document)), len(document)]:
        sentence = document[start:end].rstrip()
        last = LAST.search(sentence)
        if last is not None and len(WORD.findall(sentence[: last.start()])) >= FEWEST_WORDS:
            gap = start + last.start()
            space = document[gap - 1] == " "
            prompt = document[max(0, gap - context) : gap - space]
            if gap > context:
                prompt = re.sub(r"^\S*\s+", "", prompt, count=1)  # the first word may be cut in two
            if prompt.strip():
                yield prompt, " " * space + last["word"]
        start = end + 1
