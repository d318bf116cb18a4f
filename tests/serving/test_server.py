"""The server in a process of its own, asked by OpenAI's client: the text of generate, and nothing lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from serving import servers  # noqa: E402
from serving.servers import PROMPT, Running  # noqa: E402

from fp8kernels.serving import generate, load, load_tokenizer  # noqa: E402

TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.write_folder(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with servers.running(folder, "--served-model-name", "tiny-hif8", "--waiting", "16") as running:
        yield running


def metric(server: Running, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def complete(server: Running, prompt: str = PROMPT, tokens: int = TOKENS, **more: Any) -> str:
    done = server.client().completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, **more)
    return done.choices[0].text


def test_completion_is_the_greedy_text_of_generate(server: Running, folder: Path) -> None:
    done = server.client().completions.create(model="tiny-hif8", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert PROMPT + done.choices[0].text == generate(folder, PROMPT, new_tokens=TOKENS).text
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == TOKENS
    assert done.usage.total_tokens == TOKENS + done.usage.prompt_tokens
    assert done.model == "tiny-hif8"


@pytest.mark.parametrize("prompt", [PROMPT, "class", "é€ \U0001f600"])
def test_pieces_of_a_stream_join_to_the_text(prompt: str, server: Running) -> None:
    pieces = list(
        server.client().completions.create(model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
    )
    assert len(pieces) > 2
    assert "".join(piece.choices[0].text for piece in pieces) == complete(server, prompt)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == TOKENS


def test_a_stream_ends_with_the_mark_that_clients_wait_for(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_chat_goes_through_the_template(server: Running, folder: Path) -> None:
    messages = [{"role": "system", "content": "Code."}, {"role": "user", "content": [{"type": "text", "text": "Sum"}]}]
    chat = server.client().chat.completions
    done = chat.create(model="tiny", messages=messages, max_completion_tokens=TOKENS, temperature=0)
    tokenizer = load_tokenizer(folder)
    plain = [{**message, "content": text} for message, text in zip(messages, ("Code.", "Sum"), strict=True)]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = load(folder).generate(**ids, do_sample=False, max_new_tokens=TOKENS)
    assert done.choices[0].message.content == tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert done.usage.prompt_tokens == ids["input_ids"].shape[1]
    pieces = chat.create(model="tiny", messages=messages, max_tokens=TOKENS, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == done.choices[0].message.content


def test_models_and_health_name_what_is_served(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-hif8"]
    assert client.models.retrieve("tiny").id == "tiny"
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "model": "tiny"})


def test_a_name_that_is_not_served_is_told_those_that_are(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny, tiny-hif8") as told:
        server.client().completions.create(model="meta/other", prompt=PROMPT)
    assert told.value.code == "model_not_found"


def test_what_exceeds_the_context_is_told_in_numbers(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"4 prompt tokens and max_tokens 4096 are 4100 .* 4096"):
        server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=4096)


def test_metrics_count_requests_tokens_and_bytes(server: Running, folder: Path) -> None:
    answered = {"route": "/v1/completions", "status": "200"}
    names = ("fp8kernels_requests_total", "fp8kernels_generated_tokens_total", "fp8kernels_prompt_tokens_total")
    before = [metric(server, names[0], **answered), *(metric(server, name) for name in names[1:])]
    first = metric(server, "fp8kernels_time_to_first_token_seconds_count")
    complete(server)
    after = [metric(server, names[0], **answered), *(metric(server, name) for name in names[1:])]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, TOKENS, 4]
    assert metric(server, "fp8kernels_time_to_first_token_seconds_count") == first + 1
    assert metric(server, "fp8kernels_eight_bit_layers") == 7 * servers.SIZE.layers
    assert metric(server, "fp8kernels_model_bytes") > 100_000
    assert metric(server, "process_resident_memory_bytes") > 1e8
    assert metric(server, "fp8kernels_requests_in_flight") == 1  # the one that asks


def test_eight_clients_at_once_lose_nothing(server: Running) -> None:
    prompts = [f"def f{index}(" for index in range(8)]
    alone = [complete(server, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(lambda prompt: complete(server, prompt), prompts)) == alone


@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_a_client_that_leaves_frees_its_place(kind: str, server: Running) -> None:
    before = metric(server, "fp8kernels_generations_abandoned_total")
    body = {"prompt": PROMPT, "max_tokens": 4000, "stream": kind == "stream"}
    if kind == "stream":
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=servers.SECONDS) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    until = time.monotonic() + servers.SECONDS
    while metric(server, "fp8kernels_generations_abandoned_total") == before and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(server, "fp8kernels_generations_abandoned_total") == before + 1
    assert metric(server, "fp8kernels_generations_running") == 0
    assert complete(server, tokens=2)


def test_one_that_waits_and_leaves_is_never_generated(server: Running) -> None:
    holder = threading.Thread(target=complete, args=(server, PROMPT, 600))
    holder.start()
    until = time.monotonic() + servers.SECONDS
    while metric(server, "fp8kernels_generations_running") == 0 and time.monotonic() < until:
        time.sleep(0.01)
    tokens, prompts = (f"fp8kernels_{name}_tokens_total" for name in ("generated", "prompt"))
    made, accepted = metric(server, tokens), metric(server, prompts)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4000}, timeout=0.3)
    holder.join()
    assert metric(server, prompts) == accepted + 4
    assert metric(server, tokens) <= made + 600
    assert metric(server, "fp8kernels_generations_waiting") == 0


def test_a_seed_repeats_a_sample(server: Running) -> None:
    def sample(seed: int) -> str:
        done = server.client().completions.create(
            model="tiny", prompt="x", max_tokens=TOKENS, temperature=1.5, seed=seed
        )
        return done.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("stop", [["return"], "\n    return a", ["no such text", "urn", " + b"]])
def test_generation_ends_before_a_stop_string(server: Running, stop: Any) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    free = server.client().completions.create(**ask).choices[0].text
    done = server.client().completions.create(**ask, stop=stop).choices[0]
    stops = [stop] if isinstance(stop, str) else stop
    assert done.text == free[: min(free.find(one) for one in stops if one in free)]
    assert done.finish_reason == "stop"
    pieces = list(server.client().completions.create(**ask, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == done.text
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_the_beginning_of_a_stop_string_is_sent_where_it_does_not_go_on(server: Running) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = complete(server)
    stop = [whole[-3:] + "never", whole[4:8] + "never"]
    pieces = server.client().completions.create(**ask, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole
