"""Which engine serves, and the words that vLLM is started with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8kernels.serving.server import Settings, serve
from fp8kernels.serving.server import engine as engines


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what this machine seems to have."""

    def set_up(*, vllm: bool, gpu: bool) -> None:
        monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object() if vllm else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return set_up


@pytest.mark.parametrize(
    ("settings", "vllm", "gpu", "engine"),
    [
        ({}, True, True, "vllm"),
        ({}, True, False, "transformers"),
        ({}, False, True, "transformers"),
        ({"engine": "transformers"}, True, True, "transformers"),
        ({"engine": "vllm"}, True, True, "vllm"),
        ({"head": "e4m3"}, True, True, "transformers"),
        ({"kv_cache": "hif8"}, True, True, "transformers"),
        ({"kv_cache": "e4m3"}, True, True, "vllm"),
    ],
)
def test_the_engine_that_fits(settings: dict[str, Any], vllm, gpu, engine: str, machine) -> None:
    machine(vllm=vllm, gpu=gpu)
    assert engines.choose(Settings(**settings)) == engine


@pytest.mark.parametrize(
    ("settings", "vllm", "gpu", "error", "match"),
    [
        ({}, False, True, ImportError, "pip install vllm"),
        ({}, True, False, ValueError, "finds no GPU"),
        ({"head": "e4m3"}, True, True, ValueError, "no 8-bit head"),
        ({"kv_cache": "hif8"}, True, True, ValueError, "no hif8 cache"),
    ],
)
def test_vllm_that_cannot_serve_is_refused_with_the_reason(settings, vllm, gpu, error, match: str, machine) -> None:
    machine(vllm=vllm, gpu=gpu)
    with pytest.raises(error, match=match):
        engines.choose(Settings(engine="vllm", **settings))


def test_serve_becomes_vllm_with_the_same_settings(machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(vllm=True, gpu=True)
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['HF_HUB_OFFLINE'], os.environ['VLLM_API_KEY']]))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("FP8KERNELS_API_KEY", "sesame")
    called: list[Any] = []

    class Executed(Exception):
        """exec does not return."""

    def execute(path: str, words: list[str], environment: dict[str, str]) -> None:
        called.append((path, words, environment))
        raise Executed

    monkeypatch.setattr(engines.os, "execvpe", execute)
    folder = tmp_path / "tiny"
    folder.mkdir()
    with pytest.raises(Executed):
        serve(folder, Settings(port=8123, names=("small",), kv_cache="e4m3", extra=("--max-model-len", "64")))
    (path, words, environment) = called[0]
    assert path == str(program)
    wanted = f"serve {folder} --host 127.0.0.1 --port 8123 --served-model-name tiny small --kv-cache-dtype fp8_e4m3"
    assert words[1:] == [*wanted.split(), "--max-model-len", "64"]
    assert "sesame" not in words
    assert (environment["HF_HUB_OFFLINE"], environment["VLLM_API_KEY"]) == ("1", "sesame")


def test_words_for_vllm_are_refused_where_transformers_serves(machine, tmp_path: Path) -> None:
    machine(vllm=False, gpu=False)
    with pytest.raises(ValueError, match="--max-model-len 64: further words are for vLLM"):
        serve(tmp_path, Settings(extra=("--max-model-len", "64")))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "sglang"}, "one of auto, transformers, vllm"),
        ({"port": 70000}, "port is 70000"),
        ({"waiting": -1}, "waiting is -1"),
        ({"body_bytes": 0}, "body_bytes is 0"),
        ({"grace_seconds": -1}, "grace_seconds is -1"),
        ({"names": (" ",)}, "name of the model is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Settings(**settings)
