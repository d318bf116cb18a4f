"""The server on a compressed-tensors folder, with head and cache in 8 bits, gives the text of the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
from serving import servers  # noqa: E402
from serving.servers import PROMPT  # noqa: E402

from fp8kernels.export import export  # noqa: E402
from fp8kernels.serving import load  # noqa: E402

TOKENS = 12


def test_a_compressed_folder_with_head_and_cache_in_8_bits(e4m3: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "static"
    export(e4m3, folder, format="compressed-tensors", tokenizer=tokenizer)
    model = load(folder, head="e4m3", kv_cache="e4m3")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    wanted = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with servers.running(folder, "--head", "e4m3", "--kv-cache", "e4m3") as server:
        client = server.client()
        done = client.completions.create(model="static", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
        page = httpx.get(f"{server.url}/metrics").text
    assert done.choices[0].text == wanted
    assert "fp8kernels_eight_bit_layers 15.0" in page  # 7 in each of 2 blocks, and the head
