"""Timing on a GPU: CUDA events around replays of a graph, so that neither the host nor its launches are in the time.

Work that cannot be captured is timed with events around its calls, and the row says so. Both sides are queued in turns
without waiting, so that the GPU never idles between them and both see the same clocks and temperature.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections.abc import Callable
from functools import cache

import torch

from .measure import COPY_ELEMENTS, Samples, Work

SAMPLE = 1e-3  # seconds; shorter work is repeated inside one graph until it takes this long
MAX_REPEATS = 64
MIN_ROUNDS, MAX_ROUNDS = 9, 100
MIN_STEPS = 5
WARM_UP = 3  # calls before capture: lazy initialisation and Triton's compilation happen there
BEYOND = 4  # times the L2 that calls in turn touch before one comes back to its buffers
MAX_SETS = 64
GRAPH, EVENTS = "graph replays", "events around calls"


def take_turns(ours: Work, baseline: Work, seconds: float) -> Samples:
    """Seconds of one call of each, from the same rounds, for about `seconds` in all."""
    a, b = Prepared(ours), Prepared(baseline)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / (a.seconds + b.seconds))))
    marks = [(a.mark(), b.mark()) for _ in range(rounds)]
    torch.cuda.synchronize()
    how = GRAPH if a.how == b.how == GRAPH else f"ours: {a.how}, baseline: {b.how}"
    return Samples([a.between(one) for one, _ in marks], [b.between(two) for _, two in marks], how)


def events_only(ours: Work, baseline: Work, seconds: float) -> Samples:
    """The same for work that waits for the GPU by itself, as a training step that returns its loss does."""
    works, found = (ours, baseline), ([], [])
    took = 0.0
    while took < seconds or len(found[0]) < MIN_STEPS:
        for work, samples in zip(works, found, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
            took += samples[-1]
    return Samples(*found, EVENTS)


class Prepared:
    """Work that is warm, captured in a graph where that can be, and repeated until it takes a sample's time.

    raises   what the work raises when it is called outside a capture
    """

    def __init__(self, work: Work) -> None:
        side = torch.cuda.Stream()  # capture wants warm-up on another stream than the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.repeats, self.run, self.how = 1, work, EVENTS
        once = self.between(self.mark())
        self.repeats = max(1, min(MAX_REPEATS, int(SAMPLE / max(once, 1e-7))))
        graph = captured(work, self.repeats)
        if graph is not None:
            self.run, self.how = graph.replay, GRAPH
            self.between(self.mark())
        else:
            self.run = repeated(work, self.repeats)
        self.seconds = self.between(self.mark()) * self.repeats  # of one sample

    def mark(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queue one sample; its start and its end."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        return start, end

    def between(self, marks: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        """Seconds of one call; waits for the end."""
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3 / self.repeats


def captured(work: Work, repeats: int) -> torch.cuda.CUDAGraph | None:
    """A graph of some calls, or None where one of them does what a capture forbids: a synchronisation, for example."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def repeated(work: Work, repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            work()

    return run


def median(work: Work) -> float:
    """Seconds of one call, from a few rounds."""
    prepared = Prepared(work)
    marks = [prepared.mark() for _ in range(MIN_ROUNDS)]
    return statistics.median(prepared.between(each) for each in marks)


@cache
def copy_bandwidth(seconds: float = 0.2) -> float:
    """GB/s, read + written, of a bf16 `copy_` well beyond the L2."""
    x = torch.randn(COPY_ELEMENTS, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    samples = take_turns(lambda: y.copy_(x), lambda: y.copy_(x), seconds)
    return 2 * x.nbytes / statistics.median(samples.ours + samples.baseline) / 1e9


def sets_beyond_cache(size: int) -> int:
    """How many sets of buffers of `size` bytes are several times the L2 of this GPU."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MAX_SETS, -(-BEYOND * cache_bytes // max(1, size))))


class Sensors:
    """What nvidia-smi reads while something is timed: clocks in MHz, power in W, temperature in °C. Changes nothing."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    PERIOD = 100  # milliseconds

    def __init__(self) -> None:
        self.readings: list[tuple[float, ...]] = []
        command = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            self.process: subprocess.Popen[str] | None = subprocess.Popen(
                [*command, "-i", "0", "-lms", str(self.PERIOD)], stdout=subprocess.PIPE, text=True
            )
        except OSError:  # no nvidia-smi: rows go without
            self.process = None
            return
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            reading = parsed(line)
            if reading:
                self.readings.append(reading)

    def since(self, count: int) -> dict[str, float]:
        """Medians of the readings from number `count` on, or the newest one."""
        newest = self.readings[count:] or self.readings[-1:]
        columns = zip(*newest, strict=True)
        return dict(zip(self.FIELDS, (statistics.median(column) for column in columns), strict=False))

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def parsed(line: str) -> tuple[float, ...] | None:
    """The numbers of one line of nvidia-smi, or None where one is not known to it ("[N/A]")."""
    try:
        return tuple(float(cell) for cell in line.split(","))
    except ValueError:
        return None
