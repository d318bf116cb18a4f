"""serve: the port first, then the model, then requests until a signal; nothing accepted is lost within the grace."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ...models.tokenizer import quiet
from .engine import choose, run_vllm
from .settings import KEY, Settings

if TYPE_CHECKING:
    from .app import Server

CUT_OFF = 1  # exit code where the grace was too short for what was accepted


def serve(folder: str | Path, settings: Settings | None = None) -> int:
    """Serve a folder over HTTP until SIGTERM or SIGINT.

    The port is taken before the model is loaded, and opens when it is: until then connections are refused.
    The first signal closes the port and lets accepted requests end; a second one ends the process at once.

    returns  0; 1 if the grace ended before the last request
    raises   as serving.load; OSError if the port cannot be taken; ValueError, ImportError for settings that cannot be
    """
    folder, settings = Path(folder), settings or Settings()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that export wrote")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
    if choose(settings) == "vllm":
        run_vllm(folder, settings)
    if settings.extra:
        raise ValueError(f"{' '.join(settings.extra)[:100]}: further words are for vLLM, and transformers serves here")
    listener = take_port(settings.host, settings.port)
    try:
        server = _load(folder, settings)
        return _run(server, listener, settings)
    finally:
        listener.close()


def take_port(host: str, port: int) -> socket.socket:
    """A socket that holds the port and does not listen yet.

    raises   OSError naming host and port
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OSError(f"host {host!r} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections just ended is free
    with _port_errors(listener, host, port):
        listener.bind(address)
    return listener


@contextmanager
def _port_errors(listener: socket.socket, host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        listener.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be taken ({error.strerror})"
        raise OSError(f"port {port} on {host} {reason}; give another one") from None


def _load(folder: Path, settings: Settings) -> Server:
    try:
        import transformers
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise ImportError("fastapi, uvicorn, pydantic or openai is missing")
        from .app import Server
        from .model import OneModel
        from .worker import one_thread
    except ImportError as error:
        raise ImportError(f"the server cannot start ({error}): pip install 'fp8kernels[serve]'") from error
    thread = one_thread()
    with quiet():
        manager = thread.submit(OneModel.of_folder, folder, settings).result()
    transformers.logging.set_verbosity_error()  # its handlers warn of each request
    return Server(manager, settings, thread, os.environ.get(KEY) or None)


def _run(server: Server, listener: socket.socket, settings: Settings) -> int:
    import uvicorn

    class Http(uvicorn.Server):
        """Uvicorn that says how many requests it cut off."""

        cut = 0

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Wait for the requests, for the grace at most."""
            await super().shutdown(sockets)
            self.cut = len(self.server_state.tasks)

    config = uvicorn.Config(
        server.app(),
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    http = Http(config)
    http.capture_signals = nullcontext  # type: ignore[assignment,method-assign]  # it raises them again at the end
    host, port = listener.getsockname()[:2]

    def end(number: int, _: FrameType | None) -> None:
        if server.ending:
            os._exit(128 + number)
        server.ending = http.should_exit = True
        if server.worker.jobs:
            said = f"ending: {settings.grace_seconds} s for requests under way: {len(server.worker.jobs)}\n"
            os.write(2, said.encode())

    with _port_errors(listener, host, port):
        listener.listen(config.backlog)
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    print(f"serving {server.manager.names[0]} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    try:
        http.run(sockets=[listener])
    finally:
        server.worker.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    if http.cut:
        os.write(2, f"ended: requests cut off after {settings.grace_seconds} s: {http.cut}\n".encode())
    return CUT_OFF if http.cut else 0
