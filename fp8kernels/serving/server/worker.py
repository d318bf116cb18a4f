"""One generation at a time, in order of arrival, behind the interface of transformers' GenerateManager.

A generation alone gives the same tokens whatever else is asked of the server: nothing of one request enters the amax or
the matrix shapes of another. A client that leaves stops its generation at the next token, or before it began.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, GenerationState, _StreamError

from .metrics import Metrics
from .requests import Refused

log = logging.getLogger("fp8kernels.serving")


def one_thread() -> ThreadPoolExecutor:
    """The thread that loads the model and generates, so that no other has helpers for parallel loops.

    OpenMP gives every thread that runs such loops helpers of its own. Where they are more than the cores, it lets all
    of them sleep between two loops, and a token of a small model takes twice the time.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")


class Abandoned(Exception):
    """Raised between two tokens of a generation that nobody waits for any more."""


class Job:
    """One accepted request, from its acceptance to its last byte."""

    def __init__(self, seed: int | None, metrics: Metrics) -> None:
        self.id = uuid.uuid4().hex
        self.seed, self.metrics = seed, metrics
        self.accepted = time.perf_counter()
        self.tokens = 0
        self.left = threading.Event()
        self.error: Exception | None = None
        self.future: Future[Any] | None = None

    def token(self) -> None:
        """Count a token that the model made.

        raises   Abandoned if the client has left
        """
        self.go_on()
        if self.tokens == 0:
            self.metrics.first_token.observe(time.perf_counter() - self.accepted)
        self.tokens += 1
        self.metrics.generated_tokens.inc()

    def go_on(self) -> None:
        """raises Abandoned if the client has left."""
        if self.left.is_set():
            raise Abandoned

    def failure(self) -> Refused:
        """What the client is told of an error within the generation: its first line, no traceback."""
        lines = str(self.error).strip().splitlines() or [type(self.error).__name__]
        return Refused(f"the generation failed: {lines[0][:300]}", status=500, code="generation_failed")


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings, which OpenAI's API leaves out of answers."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class Watch:
    """A streamer that counts, for answers in one piece."""

    def __init__(self, job: Job) -> None:
        self.job, self.prompt = job, True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        if self.prompt:
            self.prompt = False
            return self.job.go_on()
        return self.job.token()

    def end(self) -> None:
        """Nothing is left to flush."""


class Stream(DirectStreamer):
    """Transformers' streamer that counts too, and sends what its decoder still held back at the end.

    The decoder keeps the bytes of an unfinished character; answers in one piece show them as U+FFFD, so this does.
    What may begin a stop string waits for the next piece, and nothing is sent from a stop string on.
    """

    def __init__(self, job: Job, tokenizer: Any, *arguments: Any, stops: Sequence[str] = (), **options: Any) -> None:
        super().__init__(tokenizer._tokenizer, *arguments, **options)
        self.job, self.whole, self.sent = job, tokenizer, ""
        self.ids: list[int] = []
        self.stops, self.waiting, self.stopped = stops, "", False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        if self._first:
            self.job.go_on()
        else:
            self.job.token()
            self.ids += value.tolist()
        super().put(value)

    def _enqueue(self, item: Any) -> None:
        self.sent += item if isinstance(item, str) else ""
        if self.stops and type(item) is str:  # content; what a parser takes for a thought or a call has other types
            item = self._until_stop(item)
            if not item:
                return
        super()._enqueue(item)

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self.waiting + piece
        before = until_stop(text, self.stops)
        self.stopped, self.waiting = len(before) < len(text), ""
        if not self.stopped:
            longest = max(map(len, self.stops)) - 1
            tails = (text[start:] for start in range(max(0, len(text) - longest), len(text)))
            self.waiting = next((tail for tail in tails if any(stop.startswith(tail) for stop in self.stops)), "")
            before = text.removesuffix(self.waiting)
        return before

    def end(self) -> None:
        """What is held back, then the mark of the end."""
        if self._parser is None:
            text = self.whole.decode(self.ids, skip_special_tokens=True)
            if text.startswith(self.sent) and len(text) > len(self.sent):
                self._enqueue(text[len(self.sent) :])
        if self.waiting:
            super()._enqueue(self.waiting)
        super().end()

    def cancel(self) -> None:
        """The client has left."""
        self.job.left.set()


class Worker(GenerateManager):
    """Runs generations on one thread; accepts as many as may wait.

    waiting   requests beyond the running one
    thread    of one_thread(), the one that loaded the model
    """

    def __init__(self, waiting: int, metrics: Metrics, thread: ThreadPoolExecutor) -> None:
        self.limit, self.metrics = waiting + 1, metrics
        self.jobs: dict[str, Job] = {}
        self.pool = thread
        self.alive, self.running = True, 0
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: max(0, len(self.jobs) - self.running))

    def open(self, seed: int | None, prompt_tokens: int) -> Job:
        """Accept a request; whoever opens closes.

        raises   Refused with 503 if as many as may wait do
        """
        if len(self.jobs) >= self.limit:
            raise Refused(
                f"{len(self.jobs)} requests are running or waiting, and the limit is {self.limit}; try again soon",
                status=503,
                code="queue_full",
            )
        job = Job(seed, self.metrics)
        self.jobs[job.id] = job
        self.metrics.prompt_tokens.inc(prompt_tokens)
        return job

    def close(self, job: Job) -> None:
        """The answer is out, or its client gone: stop what still runs and free the place."""
        self.jobs.pop(job.id, None)
        job.left.set()
        if job.future is not None and not job.future.done() and job.future.cancel():  # had not begun; else see go_on
            self.metrics.abandoned.inc()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Stream]:
        """As transformers': text pieces come through the queue, None ends them."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        job = self.jobs[request_id]
        stops = gen_config.stop_strings or ()
        stream = Stream(job, processor, loop, queue, stops=stops, response_parser=response_parser)
        arguments = {**inputs, "streamer": stream, "generation_config": gen_config, "tokenizer": processor}

        def run() -> None:
            try:
                self._run(job, model, arguments)
            except Abandoned:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(json.dumps(str(error))[1:-1]))

        job.future = self._submit(run)
        return queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """As transformers': text, tokens of the prompt, ids [new]."""
        job = self.jobs[request_id]
        arguments = {**inputs, "streamer": Watch(job), "generation_config": gen_config, "tokenizer": processor}
        job.future = self._submit(lambda: self._run(job, model, arguments))
        sequences = await asyncio.wrap_future(job.future)
        length = inputs["input_ids"].shape[-1]
        ids = sequences[0, length:]
        text = processor.decode(ids, skip_special_tokens=True)
        return until_stop(text, gen_config.stop_strings or ()), length, ids

    def _submit(self, run: Callable[[], Any]) -> Future[Any]:
        try:
            return self.pool.submit(run)
        except RuntimeError as error:  # the pool has ended
            self.alive = False
            raise Refused(f"the server generates no more: {error}", status=503, code="worker_ended") from error

    def _run(self, job: Job, model: Any, arguments: dict[str, Any]) -> Any:
        self.running = 1
        try:
            job.go_on()
            if job.seed is not None:
                torch.manual_seed(job.seed)
            return model.generate(**arguments)  # [1, prompt + new] int64
        except Abandoned:
            self.metrics.abandoned.inc()
            raise
        except Exception as error:
            job.error = error
            self.metrics.failed.inc()
            log.exception("generation %s failed after %d tokens", job.id, job.tokens)
            raise
        finally:
            self.running = 0
            self.jobs.pop(job.id, None)  # the place is free, however slowly the client reads

    def stop(self) -> None:
        """Accept no more, and give up what runs."""
        self.alive = False
        for job in list(self.jobs.values()):
            job.left.set()
        self.pool.shutdown(wait=False, cancel_futures=True)


class OneWorker(GenerationState):
    """What transformers' handlers ask for a manager; it is always the one worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    def get_manager(self, model_id: str, use_cb: bool = False) -> Worker:  # noqa: FBT001, FBT002  transformers' own
        """The worker, whatever the model's name."""
        return self.worker
