"""docs/SERVING.md does what it says: its commands and its Python, on a tiny model that a run left behind."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import common
from serving.servers import SECONDS, running
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.integrations.trained import load_trained
from fp8kernels.runs.precision import EIGHT_BIT, RECIPE, save_eight_bit
from fp8kernels.scaling import without_state

PAGE = (Path(__file__).parents[2] / "docs" / "SERVING.md").read_text(encoding="utf-8")


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of the page."""
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
    assert text is not None, section
    found = re.findall(rf"```{language}\n(.*?)```", text[1], flags=re.S)
    assert found, f"{section} has no {language}"
    return found


@pytest.fixture
def runs(hif8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `runs` of the page, with the model of a run in it, as the working directory's."""
    folder = tmp_path / "runs" / "hif8"
    state = hif8.state_dict()
    common.plain().save_pretrained(folder, state_dict=without_state(state))
    common.tokenizer().save_pretrained(folder)
    save_eight_bit(state, folder / EIGHT_BIT)
    (folder / RECIPE).write_text(json.dumps({"recipe": "hif8-qat", "recipe_changes": {}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_commands_make_a_folder_and_a_server_that_answers(runs: Path) -> None:
    commands, request = (shlex.split(block, comments=True) for block in blocks("Quick start", "sh"))
    text = " ".join(commands)
    export, check, serve = (part.split() for part in text.split("fp8kernels ")[1:])
    for words in (export, check):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert serve == ["serve", "runs/served", "--port", "8000"]
    body = json.loads(request[request.index("-d") + 1])
    with running(Path("runs/served")) as server:
        path = request[1].removeprefix("http://127.0.0.1:8000")
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=SECONDS).json()
    assert answer["model"] == "served"
    assert answer["usage"]["completion_tokens"] <= body["max_tokens"]
    assert isinstance(answer["choices"][0]["text"], str)


def test_the_python_exports_loads_and_streams(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for section in ("Quick start", "Weights into a running server"):
        for block in blocks(section, "python"):
            exec(block, scope)
    assert "torch.float8_e4m3fn" in capsys.readouterr().out
    model, _ = load_trained(runs / "hif8")
    ids = common.prompt_ids()
    with torch.no_grad():
        trained, loaded = model(ids).logits, scope["loaded"](ids).logits
    assert (loaded.float() - trained).norm() < 0.1 * trained.norm(), "E4M3 and bf16 round, they do not change the model"
