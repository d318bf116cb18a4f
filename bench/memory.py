"""How much memory a piece of work on a CPU holds at most: every allocation that torch makes, in the order of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes. What the work had allocated before it began is in neither.

    peak  the most that was held at one time of what was given back before the end: what autograd keeps, and temporaries
    kept  what was still there at the end: gradients of parameters, and what modules keep from step to step
    """

    peak: int
    kept: int


def memory_of(work: Callable[[], Any]) -> Memory:
    """The memory of one call of `work`, by the reports of torch's allocator to its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()  # alive to the end, so that it counts as kept
    changes = sorted(_changes(profile.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]
    del result
    held: dict[int, tuple[int, int]] = {}  # address: which change allocated it, and its bytes
    for index, (_, address, size) in enumerate(changes):
        if size > 0:
            held[address] = (index, size)
        else:
            held.pop(address, None)
    stays = {index for index, _ in held.values()}
    now = peak = 0
    given: set[int] = set()
    for index, (_, address, size) in enumerate(changes):
        if index in stays or (size < 0 and address not in given):
            continue
        (given.add if size > 0 else given.discard)(address)
        now += size
        peak = max(peak, now)
    return Memory(peak, sum(size for _, size in held.values()))


def _changes(events: list[Any]) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation; bytes are negative where one is given back."""
    found = []
    for event in events:
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        found += _changes(event.children)
    return found
