"""Load on a server: clients that ask at once over HTTP, each for one stream after another, and what came back.

    python -m bench.load_test FOLDER --clients 8 --requests 64            starts `fp8kernels serve FOLDER` on its own
    python -m bench.load_test http://127.0.0.1:8000 --seconds 30 --json   asks one that runs

A request is *answered* when its stream came to its mark of the end with a reason, *refused* with status 4xx or 503,
*failed* when the server said so, and *lost* when none of these came: cut off, or silent until the timeout.
Exit code 1 if one was lost or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT = 300  # seconds of silence after which a request counts as lost
PROMPT = "def add(a"


@dataclass(frozen=True)
class Answer:
    """One request. Seconds are from its sending; None where it did not come to that."""

    outcome: str  # answered, refused, failed, lost
    text: str = ""
    tokens: int = 0
    first: float | None = None
    whole: float | None = None
    said: str = ""


@dataclass(frozen=True)
class Load:
    """What came of all requests; latencies in seconds, over those that were answered."""

    clients: int
    sent: int
    answered: int
    refused: int
    failed: int
    lost: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    latency_p50: float
    latency_p99: float
    first_token_p50: float
    first_token_p99: float
    said: tuple[str, ...]  # the first errors, each once


def ask(client: httpx.Client, url: str, prompt: str, tokens: int) -> Answer:
    """One stream of greedy text."""
    started, first, pieces, reason, usage = time.perf_counter(), None, [], None, 0
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    try:
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                said = response.read().decode(errors="replace")[:300]
                refused = 400 <= response.status_code < 500 or response.status_code == 503
                return Answer("refused" if refused else "failed", said=said)
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    whole = time.perf_counter() - started
                    if reason is None:
                        return Answer("lost", said="a stream without a reason for its end")
                    return Answer("answered", "".join(pieces), usage, first, whole)
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Answer("failed", said=str(event["error"])[:300])
                first = first if first is not None else time.perf_counter() - started
                pieces.append(event["choices"][0]["text"])
                reason = event["choices"][0].get("finish_reason") or reason
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
        return Answer("lost", said="a stream without its mark of the end")
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        return Answer("lost", said=f"{type(error).__name__}: {error}"[:300])


def run(
    url: str, *, clients: int, requests: int, seconds: float = float("inf"), tokens: int = 32, prompt: str = PROMPT
) -> tuple[Load, list[Answer]]:
    """Ask from `clients` threads, until `requests` are sent or `seconds` are over; all that was sent is waited for."""
    numbers, lock = itertools.count(), threading.Lock()
    started = time.perf_counter()

    def one_client(_: int) -> list[Answer]:
        answers = []
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            while time.perf_counter() - started < seconds:
                with lock:
                    number = next(numbers)
                if number >= requests:
                    break
                answers.append(ask(client, url, f"{prompt}{number % clients}", tokens))
        return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for each in pool.map(one_client, range(clients)) for answer in each]
    return summary(answers, clients, time.perf_counter() - started), answers


def summary(answers: list[Answer], clients: int, seconds: float) -> Load:
    """Counts and percentiles."""
    good = [answer for answer in answers if answer.outcome == "answered"]
    count = {kind: sum(answer.outcome == kind for answer in answers) for kind in ("refused", "failed")}
    whole = sorted(answer.whole for answer in good if answer.whole is not None)
    first = sorted(answer.first for answer in good if answer.first is not None)
    return Load(
        clients=clients,
        sent=len(answers),
        answered=len(good),
        lost=len(answers) - len(good) - count["refused"] - count["failed"],
        seconds=seconds,
        requests_per_second=len(good) / seconds,
        tokens_per_second=sum(answer.tokens for answer in good) / seconds,
        latency_p50=percentile(whole, 50),
        latency_p99=percentile(whole, 99),
        first_token_p50=percentile(first, 50),
        first_token_p99=percentile(first, 99),
        said=tuple(dict.fromkeys(answer.said for answer in answers if answer.said))[:5],
        **count,
    )


def percentile(ordered: list[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed; NaN of none."""
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)] if ordered else float("nan")


@contextlib.contextmanager
def server(folder: Path, *words: str) -> Iterator[str]:
    """`fp8kernels serve` on a free port until the end of the block; gives its URL."""
    command = [sys.executable, "-m", "fp8kernels", "serve", str(folder), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if " on http" not in line:
            raise RuntimeError(f"the server of {folder} did not start: {line!r}")
        yield line.split(" on ")[1].strip().removesuffix("/v1")
    finally:
        process.terminate()
        process.wait()


def table(load: Load) -> str:
    """A few lines for people."""
    fate = f"{load.sent} sent: {load.answered} answered, {load.refused} refused, {load.failed} failed, {load.lost} lost"
    lines = [
        f"{load.clients} clients, {load.seconds:.1f} s",
        fate,
        f"throughput      {load.requests_per_second:9.2f} requests/s {load.tokens_per_second:9.1f} tokens/s",
        f"latency         {load.latency_p50:9.3f} s p50       {load.latency_p99:9.3f} s p99",
        f"first token     {load.first_token_p50:9.3f} s p50       {load.first_token_p99:9.3f} s p99",
    ]
    return "\n".join([*lines, *load.said])


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.load_test", description=__doc__.splitlines()[0])
    parser.add_argument("where", help="a folder to serve, or the URL of a server")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64, help="to send in all")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no more is sent")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--prompt", default=PROMPT, help="the number of a client is added")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(words)
    if min(given.clients, given.requests, given.tokens) < 1 or given.clients > 256:
        parser.error("clients (at most 256), requests and tokens are 1 or more")
    settings: dict[str, Any] = {
        name: getattr(given, name) for name in ("clients", "requests", "seconds", "tokens", "prompt")
    }
    running = (
        contextlib.nullcontext(given.where.rstrip("/").removesuffix("/v1"))
        if given.where.startswith(("http://", "https://"))
        else server(Path(given.where), "--waiting", str(given.clients))
    )
    with running as url:
        load, _ = run(url, **settings)
    print(json.dumps(dataclasses.asdict(load)) if given.json else table(load))
    return 1 if load.lost or load.failed else 0


if __name__ == "__main__":
    sys.exit(main())
