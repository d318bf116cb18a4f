"""The load test counts what a server does to its clients; this one does it by turns."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("httpx")
from bench import load_test


def event(text: str, reason: str | None = None, tokens: int | None = None) -> str:
    found: dict[str, Any] = {"choices": [{"text": text, "finish_reason": reason}]}
    return f"data: {json.dumps(found | ({} if tokens is None else {'usage': {'completion_tokens': tokens}}))}\n\n"


WHOLE = event("de") + event("f") + event("", "length", 2) + "data: [DONE]\n\n"
ANSWERS = [
    (200, WHOLE),
    (503, '{"error": {"message": "full"}}'),
    (400, '{"error": {"message": "wrong"}}'),
    (500, '{"error": {"message": "broken"}}'),
    (200, event("de") + 'data: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n'),
    (200, event("de")),  # ends early
    (200, event("de") + "data: [DONE]\n\n"),  # without a reason
    (200, "data: {\n\n"),
    (200, None),  # cut within the body
    (200, WHOLE),
]


@pytest.fixture
def url() -> Iterator[str]:
    turns, lock = iter(ANSWERS), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                status, body = next(turns)
            sent = (body or event("de")).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(sent) if body else 10 * len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("clients", [1, 4])
def test_every_request_is_counted_once(url: str, clients: int) -> None:
    load, answers = load_test.run(url, clients=clients, requests=len(ANSWERS))
    assert (load.sent, load.answered, load.refused, load.failed, load.lost) == (10, 2, 2, 2, 4)
    assert [answer.text for answer in answers if answer.outcome == "answered"] == ["def", "def"]
    assert load.tokens_per_second * load.seconds == pytest.approx(4)
    assert 0 < load.first_token_p50 <= load.latency_p50 <= load.latency_p99
    assert any("full" in said for said in load.said)


def test_the_command_fails_where_something_was_lost(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_test.main([url, "--clients", "1", "--requests", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 1
    assert load_test.main([f"{url}/v1", "--clients", "2", "--requests", "9"]) == 1
    assert "9 sent: 1 answered, 2 refused, 2 failed, 4 lost" in capsys.readouterr().out


def test_nothing_is_sent_after_the_time_is_over(url: str) -> None:
    load, _ = load_test.run(url, clients=2, requests=10, seconds=0)
    assert load.sent == 0
    assert str(load.latency_p50) == "nan"


def test_percentiles_are_values_that_were_measured() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [load_test.percentile(ordered, percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert load_test.percentile([7.0], 99) == 7.0
