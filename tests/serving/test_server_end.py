"""How a server starts and ends: taken ports, bad folders, signals while it answers."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
from serving import servers  # noqa: E402
from serving.servers import PROMPT, SECONDS, Running  # noqa: E402

from fp8kernels.serving.server.run import take_port  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.write_folder(tmp_path_factory.mktemp("end") / "tiny", template=None)


class Asked(threading.Thread):
    """A request under way; `answer` is its response, or what went wrong."""

    def __init__(self, server: Running, tokens: int, state: str = "running") -> None:
        super().__init__(daemon=True)
        self.url, self.tokens, self.answer = server.url, tokens, None
        self.start()
        until = time.monotonic() + SECONDS
        while f"generations_{state} 1.0" not in httpx.get(f"{self.url}/metrics").text and time.monotonic() < until:
            time.sleep(0.01)

    def run(self) -> None:
        body = {"prompt": PROMPT, "max_tokens": self.tokens, "temperature": 0}
        try:
            self.answer: Any = httpx.post(f"{self.url}/v1/completions", json=body, timeout=SECONDS)
        except httpx.HTTPError as error:
            self.answer = error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_request_end(number: signal.Signals, folder: Path) -> None:
    with servers.running(folder, "--grace", "60") as server:
        asked = [Asked(server, 500), Asked(server, 4, "waiting")]  # one runs, one waits
        server.process.send_signal(number)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        for request in asked:
            request.join(SECONDS)
        out, said = server.process.communicate(timeout=SECONDS)
    assert [request.answer.json()["usage"]["completion_tokens"] for request in asked] == [500, 4]
    assert server.process.returncode == 0
    assert said == "ending: 60 s for requests under way: 2\n"
    assert out == ""


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with servers.running(folder, "--grace", "60") as server:
        Asked(server, 4000)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 5


def test_what_outlasts_the_grace_is_cut_off_and_told(folder: Path) -> None:
    with servers.running(folder, "--grace", "1") as server:
        asked = Asked(server, 4000)
        server.process.send_signal(signal.SIGTERM)
        _, said = server.process.communicate(timeout=SECONDS)
        asked.join(SECONDS)
    assert server.process.returncode == 1
    assert said.splitlines()[-1] == "ended: requests cut off after 1 s: 1"
    assert "Traceback" not in said
    assert asked.answer.status_code == 503
    assert asked.answer.json()["error"]["code"] == "server_ending"


def test_a_taken_port_is_one_line_before_the_model_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is in use; give another one"):
            take_port("127.0.0.1", port)
        process = servers.launch(folder, "--port", str(port))
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert said == f"error: port {port} on 127.0.0.1 is in use; give another one\n"


def test_a_host_of_elsewhere_is_told() -> None:
    with pytest.raises(OSError, match="cannot be taken"):
        take_port("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors"),
    ],
    ids=["no-tokenizer", "foreign"],
)
def test_a_bad_folder_is_told_in_one_line_and_the_port_is_free_again(
    spoil, match, folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    subprocess.run(["cp", "-r", str(folder), str(bad)], check=True)
    spoil(bad)
    process = servers.launch(bad)
    out, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert out == ""
    assert said.startswith("error: ")
    assert match in said
    assert "Traceback" not in said
