"""The routes of the server: an ASGI app around one loaded model."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...nn.inference import InferenceLinear, nbytes
from .endpoints import Chat, Completions
from .metrics import CONTENT_TYPE, Metrics
from .model import OneModel
from .requests import Refused, parse
from .settings import KEY, Settings
from .worker import Job, OneWorker, Worker

log = logging.getLogger("fp8kernels.serving")
BODY_SECONDS = 30  # that a client has to send its body
RETRY_SECONDS = 1  # that a client is asked to wait where the queue is full
LEFT = 499  # status of requests whose client has gone, as in nginx; nobody reads it but /metrics


class Server:
    """The state behind the routes.

    thread   of one_thread(), the one that loaded the model
    key      that requests must carry; None lets all in
    """

    def __init__(
        self, manager: OneModel, settings: Settings, thread: ThreadPoolExecutor, key: str | None = None
    ) -> None:
        self.manager, self.settings, self.key = manager, settings, key
        self.metrics = Metrics()
        self.worker = Worker(settings.waiting, self.metrics, thread)
        state = OneWorker(self.worker)
        self.endpoints: dict[str, Completions | Chat] = {
            "/v1/completions": Completions(manager, state),
            "/v1/chat/completions": Chat(manager, state),
        }
        self.ending = False
        self.metrics.model_bytes.set(nbytes(manager.model))
        self.metrics.layers.set(sum(isinstance(module, InferenceLinear) for module in manager.model.modules()))

    def app(self) -> Starlette:
        """The ASGI app."""
        return Starlette(
            routes=[
                *(Route(path, self.answer, methods=["POST"]) for path in self.endpoints),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics_page),
            ],
            middleware=[Middleware(Gate, server=self)],
            exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _broken},
        )

    async def health(self, _: Request) -> Response:
        """200 where a request would be answered, else 503 with the reason."""
        reason = "ending" if self.ending else None if self.worker.alive else "the worker has ended"
        state = {"status": "ok" if reason is None else "unavailable", "model": self.manager.names[0]}
        return JSONResponse(state | ({} if reason is None else {"reason": reason}), 503 if reason else 200)

    async def metrics_page(self, _: Request) -> Response:
        """Prometheus' text."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, _: Request) -> Response:
        """The served names."""
        return JSONResponse({"object": "list", "data": self.manager.entries()})

    async def model(self, request: Request) -> Response:
        """One of the served names."""
        name = self.manager.check_name(request.path_params["name"])
        return JSONResponse(next(entry for entry in self.manager.entries() if entry["id"] == name))

    async def answer(self, request: Request) -> Response:
        """One completion, in one piece or as a stream; the place in the queue is held until its last byte."""
        endpoint = self.endpoints[request.url.path]
        raw = await read(request, self.settings.body_bytes)
        body, tokens = await asyncio.to_thread(lambda: endpoint.prepare(parse(raw)))
        job = self.worker.open(body.get("seed"), tokens)
        try:
            response = await self._unless_left(request, endpoint.handle_request(body, job.id))
        except Refused:
            self.worker.close(job)
            raise
        except Exception as error:
            self.worker.close(job)
            if job.error is None:
                log.exception("request %s failed before its generation", job.id)
                job.error = error
            raise job.failure() from None
        except asyncio.CancelledError:
            self.worker.close(job)
            if not self.ending:
                raise
            raise Refused("the server has ended before the answer", status=503, code="server_ending") from None
        if isinstance(response, StreamingResponse):
            response.body_iterator = _whole_stream(response.body_iterator, job)
        return Held(response, self.worker, job)

    async def _unless_left(self, request: Request, work: Any) -> Response:
        """What the handler answers, or nothing as soon as the client has gone."""
        answer, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            return Response(status_code=LEFT)
        finally:
            left.cancel()
            answer.cancel()


class Held(Response):
    """A response that gives its place in the queue back, however its sending ends."""

    def __init__(self, response: Response, worker: Worker, job: Job) -> None:
        self.response, self.worker, self.job = response, worker, job
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            await self.response(scope, receive, send)
        finally:
            self.worker.close(self.job)


class Gate:
    """Middleware: the key, and what /metrics says of each request."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self.metrics = app, server, server.metrics
        self.routes = {*server.endpoints, "/v1/models", "/health", "/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route = scope["path"] if scope["path"] in self.routes else "other"
        started, status = time.perf_counter(), LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            if self.allowed(scope):
                await self.app(scope, receive, watched)
            else:
                error = Refused(
                    f"the key is missing or wrong; send 'Authorization: Bearer KEY' with the value of {KEY}",
                    status=401,
                    code="invalid_api_key",
                )
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, watched)
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.duration.labels(route).observe(time.perf_counter() - started)

    def allowed(self, scope: Scope) -> bool:
        """Whether a request carries the key, where one is set and the path asks for it."""
        if self.server.key is None or not scope["path"].startswith("/v1/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.server.key.encode())


async def read(request: Request, limit: int) -> bytes:
    """The body of a request.

    raises   Refused: 413 for more than `limit` bytes, 415 for what is not said to be JSON, 408 where it does not come
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send without asking first
        raise Refused(
            f"the content-type is {kind[:60]!r}; it must be application/json", status=415, code="unsupported_media_type"
        )
    too_large = Refused(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > limit:
        raise too_large
    raw = bytearray()

    async def collect() -> None:
        async for piece in request.stream():
            raw.extend(piece)
            if len(raw) > limit:
                raise too_large

    try:
        await asyncio.wait_for(collect(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(f"the body did not come within {BODY_SECONDS} s", status=408, code="body_timeout") from None
    except ClientDisconnect:
        raise Refused("the client has left", status=LEFT, code="client_left") from None
    return bytes(raw)


async def _left(request: Request) -> None:
    """Until the client has gone; its body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole_stream(pieces: AsyncIterable[Any], job: Job) -> AsyncIterator[str]:
    """Transformers' events, with an error as OpenAI's API shapes it and the mark that ends a whole stream."""
    async for piece in pieces:
        if job.error is not None and '{"error": "' in piece:
            break
        yield piece
    if job.error is not None:
        yield f"data: {json.dumps(job.failure().body())}\n\n"
    yield "data: [DONE]\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    said = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(Refused(said, status=error.status_code, code=code).body(), error.status_code, error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(
        Refused(f"the server failed: {type(error).__name__}", status=500, code="server_error").body(), 500
    )
