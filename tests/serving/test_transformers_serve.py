"""The stock command `transformers serve`, with our quantizer registered, on a folder of export: codes over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
from serving import servers  # noqa: E402
from serving.servers import PROMPT, SECONDS  # noqa: E402

from fp8kernels.serving import generate  # noqa: E402

STOCK = "import fp8kernels.integrations.hugging_face; from transformers.cli.transformers import main; main()"
TOKENS = 16


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder, and the URL of `transformers serve FOLDER`."""
    folder = servers.write_folder(tmp_path_factory.mktemp("stock") / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", STOCK, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            yield folder, wait(f"http://127.0.0.1:{port}", process)
        finally:
            process.kill()


def wait(url: str, process: subprocess.Popen[Any]) -> str:
    """The URL, once something answers there."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1].decode())
        try:
            httpx.get(f"{url}/health")
        except httpx.ConnectError:
            time.sleep(0.1)
        else:
            return url
    raise AssertionError(f"nothing answers at {url} after {SECONDS} s")


def test_the_stock_server_gives_our_text(stock: tuple[Path, str]) -> None:
    folder, url = stock
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS, max_retries=0)
    asked = {"model": str(folder), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    wanted = generate(folder, PROMPT, new_tokens=TOKENS).text
    assert PROMPT + client.completions.create(**asked).choices[0].text == wanted
    pieces = client.completions.create(**asked, stream=True)
    assert PROMPT + "".join(piece.choices[0].text for piece in pieces) == wanted
    chat = client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": "Sum"}], max_tokens=4, temperature=0
    )
    assert chat.usage.completion_tokens == 4
