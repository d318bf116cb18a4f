"""The routes in this process: keys, sizes, wrong methods, a full queue, and a generation that fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("httpx")
from serving import servers
from serving.servers import PROMPT
from starlette.testclient import TestClient

from fp8kernels.serving.server.app import Server
from fp8kernels.serving.server.model import OneModel
from fp8kernels.serving.server.settings import Settings
from fp8kernels.serving.server.worker import one_thread

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.write_folder(tmp_path_factory.mktemp("app") / "tiny")


@pytest.fixture(scope="module")
def manager(folder: Path) -> OneModel:
    return OneModel.of_folder(folder, Settings())


@pytest.fixture
def server(manager: OneModel) -> Iterator[Server]:
    made = Server(manager, Settings(waiting=1, body_bytes=4096), one_thread())
    yield made
    made.worker.stop()


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app(), raise_server_exceptions=False) as made:
        yield made


def error(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which is OpenAI's form and shows no insides."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "code", "param"}
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return response.json()["error"]


def test_errors_have_the_form_of_the_api(client: TestClient) -> None:
    raw = {"headers": {"content-type": "application/json"}}
    assert error(client.post(COMPLETIONS, content=b"{", **raw), 400)["code"] == "invalid_json"
    assert error(client.post(COMPLETIONS, json={}), 400)["param"] == "prompt"
    assert error(client.post(CHAT, json={}), 400)["param"] == "messages"
    assert error(client.post(CHAT, json={"messages": [{"role": "tool", "content": "a"}]}), 400)["code"] == (
        "chat_template_error"
    )
    assert error(client.post(COMPLETIONS, json=ASK | {"model": "other"}), 404)["code"] == "model_not_found"
    assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert error(client.get("/v2/models"), 404)["code"] == "not_found"
    assert error(client.get(COMPLETIONS), 405)["code"] == "method_not_allowed"
    assert error(client.post("/load_model", json={"model": "other"}), 404)["code"] == "not_found"
    assert error(client.post(COMPLETIONS, data={"prompt": "a"}), 415)["code"] == "unsupported_media_type"
    messages = [{"role": "user", "content": "a"}]
    for kwargs in ({"chat_template": "{{ 1 }}"}, {"tokenize": False}):
        refused = client.post(CHAT, json={"messages": messages, "chat_template_kwargs": kwargs})
        assert "not for clients" in error(refused, 400)["message"]
    refused = client.post(CHAT, json={"messages": messages, "logit_bias": {"300": 1}})
    assert "names token 300; the model has 300" in error(refused, 400)["message"]
    assert client.post(COMPLETIONS, json=ASK).status_code == 200


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(client: TestClient) -> None:
    large = json.dumps(ASK | {"prompt": "a" * 5000}).encode()
    headers = {"content-type": "application/json"}
    assert "4096 bytes" in error(client.post(COMPLETIONS, content=large, headers=headers), 413)["message"]
    pieces = iter([large[:3000], large[3000:]])
    assert error(client.post(COMPLETIONS, content=pieces, headers=headers), 413)["code"] == "body_too_large"
    assert client.post(COMPLETIONS, json=ASK).status_code == 200


def test_the_key_opens_v1_alone(manager: OneModel) -> None:
    server = Server(manager, Settings(), one_thread(), key="sesame")
    with TestClient(server.app()) as client:
        wrong = ({}, {"authorization": "Bearer other"}, {"authorization": "sesame"}, {"authorization": "Bearer é"})
        for headers in wrong:
            sent = {name: value.encode() for name, value in headers.items()}
            assert error(client.post(COMPLETIONS, json=ASK, headers=sent), 401)["code"] == "invalid_api_key"
            assert error(client.get("/v1/models", headers=sent), 401)["code"] == "invalid_api_key"
        assert client.post(COMPLETIONS, json=ASK, headers={"authorization": "Bearer sesame"}).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    server.worker.stop()


@pytest.fixture
def failing(manager: OneModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that breaks at its third token."""
    forward, calls = type(manager.model).forward, iter(range(10_000))

    def breaks(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError('out of memory at "layer 1"\nFile "secret.py"')
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(manager.model), "forward", breaks)


def test_a_failed_generation_is_an_error_and_the_server_goes_on(client: TestClient, failing: None) -> None:
    failed = error(client.post(COMPLETIONS, json=ASK), 500)
    assert failed["message"] == 'the generation failed: out of memory at "layer 1"'
    assert failed["type"] == "server_error"
    assert client.post(COMPLETIONS, json=ASK).status_code == 200
    assert client.get("/health").status_code == 200
    assert b"fp8kernels_generations_failed_total 1.0" in client.get("/metrics").content


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_that_fails_says_so_in_its_last_event(path: str, client: TestClient, failing: None) -> None:
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    response = client.post(path, json={**prompt, "max_tokens": 4, "stream": True})
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["message"] == 'the generation failed: out of memory at "layer 1"'
    assert all("choices" in json.loads(event) for event in events[:-2])
    assert client.post(path, json={**prompt, "max_tokens": 4}).status_code == 200


def test_one_more_than_may_wait_is_refused_and_the_others_are_answered(
    client: TestClient, server: Server, manager: OneModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, generate = threading.Event(), manager.model.generate

    def held(**arguments: Any) -> Any:
        free.wait(60)
        return generate(**arguments)

    monkeypatch.setattr(manager.model, "generate", held)
    with ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(client.post, COMPLETIONS, json=ASK) for _ in range(2)]
        until = time.monotonic() + 60
        while len(server.worker.jobs) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        refused = client.post(COMPLETIONS, json=ASK)
        page = client.get("/metrics").text
        free.set()
        answers = [future.result() for future in accepted]
    assert "2 requests are running or waiting, and the limit is 2" in error(refused, 503)["message"]
    assert refused.headers["retry-after"] == "1"
    assert "fp8kernels_generations_running 1.0" in page
    assert "fp8kernels_generations_waiting 1.0" in page
    assert [answer.status_code for answer in answers] == [200, 200]
    assert client.post(COMPLETIONS, json=ASK).status_code == 200


def test_health_tells_why_nothing_is_answered(client: TestClient, server: Server) -> None:
    server.ending = True
    assert (client.get("/health").status_code, client.get("/health").json()["reason"]) == (503, "ending")
    server.ending = False
    server.worker.stop()
    assert client.get("/health").json()["reason"] == "the worker has ended"
    assert error(client.post(COMPLETIONS, json=ASK), 503)["code"] == "worker_ended"
    assert server.worker.jobs == {}


def test_without_a_template_chat_points_to_completions(manager: OneModel, client: TestClient, monkeypatch) -> None:
    monkeypatch.setattr(manager.tokenizer, "chat_template", None)
    refused = error(client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]}), 400)
    assert refused["code"] == "no_chat_template"
    assert COMPLETIONS in refused["message"]


def test_temperature_samples_from_a_model_that_is_greedy_by_default(manager: OneModel, client: TestClient) -> None:
    assert not manager.model.generation_config.do_sample
    hot = [
        client.post(COMPLETIONS, json=ASK | {"max_tokens": 16, "temperature": 2, "seed": seed}).json()["choices"][0][
            "text"
        ]
        for seed in range(3)
    ]
    assert len(set(hot)) > 1
