"""An exported Llama in a new process: the same text, from codes alone; bad folders are told in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.convert import convert
from fp8kernels.export import export
from fp8kernels.export.layout import MANIFEST, WEIGHTS, file_stamp
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.serving import generate, load
from fp8kernels.training.step import adamw, train_step
from fp8kernels.training.tokens import byte_tokenizer, random_batches, token_stream

SIZE = LlamaSize(vocab=300, hidden=64, intermediate=128, layers=2, heads=2, context=64)
TEXT = ["def add(a, b):\n    return a + b\n" * 40, "class Sum:\n    def total(self):\n        return self.value\n" * 40]
PROMPT = "def add(a"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A tiny Llama after a few QAT steps, and its folder, high precision kept in fp32 so that results are equal."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEXT, SIZE.vocab)
    end = tokenizer.eos_token_id
    model = convert(llama(SIZE, bos_token_id=end, eos_token_id=end, pad_token_id=end), "hif8-qat", verbose=False)
    optimizer = adamw(model, 3e-3)
    batches = random_batches(token_stream(tokenizer, TEXT), 4, 32, seed=0)
    losses = [train_step(model, optimizer, next(batches)) for _ in range(10)]
    assert losses[-1] < losses[0], f"training should have begun: {losses}"
    folder = tmp_path_factory.mktemp("serving") / "model"
    export(model, folder, tokenizer=tokenizer, dtype=torch.float32)
    return model.eval(), tokenizer, folder


def test_loaded_logits_are_those_of_the_trained_model(trained) -> None:
    model, tokenizer, folder = trained
    loaded = load(folder)
    held = [name for name, module in loaded.named_modules() if isinstance(module, InferenceLinear)]
    assert len(held) == 7 * SIZE.layers
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_new_process_generates_the_text_of_the_trained_model(trained) -> None:
    model, tokenizer, folder = trained
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    wanted = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, min_new_tokens=8
    )
    command = [sys.executable, "-m", "fp8kernels", "generate", str(folder), "--prompt", PROMPT, "--new-tokens", "8"]
    done = subprocess.run(
        [*command, "--repeats", "2", "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout.splitlines()[-1])
    assert run["text"] == tokenizer.decode(wanted[0])
    assert run["tokens"] == 8
    assert run["tokens_per_second"] > 0


def test_a_plain_bf16_checkpoint_is_served_by_the_same_command(trained, tmp_path: Path) -> None:
    _, tokenizer, _ = trained
    torch.manual_seed(1)
    llama(SIZE).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = generate(tmp_path, PROMPT, new_tokens=4)
    assert run.tokens == 4
    assert run.text.startswith(PROMPT)


def test_codes_take_half_the_memory_of_bf16(trained, tmp_path: Path) -> None:
    _, _, folder = trained
    codes = sum(module.weight_codes.nbytes for module in load(folder).modules() if isinstance(module, InferenceLinear))
    linear = 4 * SIZE.hidden * SIZE.hidden + 3 * SIZE.hidden * SIZE.intermediate
    assert codes == SIZE.layers * linear


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"not a checkpoint"), "truncated"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "neither"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: rename_class(folder, "Popen"), "Popen"),
    ],
    ids=["foreign", "list", "empty", "no-config", "class"],
)
def test_bad_folders_are_told_in_one_line(spoil, match: str, trained, tmp_path: Path) -> None:
    _, _, folder = trained
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    spoil(bad)
    done = CliRunner().invoke(app, ["generate", str(bad), "--prompt", PROMPT])
    assert done.exit_code == 2
    said = done.stderr
    assert said.startswith("error: ")
    assert match in said
    assert str(bad) in said
    assert "Traceback" not in said


def rename_class(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model_class"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_cannot_bring_code(trained, tmp_path: Path) -> None:
    """A config that names Python files of its own is not followed: only transformers' own classes are built."""
    _, _, folder = trained
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    marker = tmp_path / "was-run"
    (bad / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((bad / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config["model_type"] = "evil"
    (bad / "config.json").write_text(json.dumps(config))
    manifest = json.loads((bad / MANIFEST).read_text())
    manifest["files"]["config.json"] = file_stamp(bad / "config.json")
    (bad / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(bad)
    assert not marker.exists()


@pytest.mark.parametrize(("prompt", "tokens", "match"), [("", 4, "empty"), (PROMPT, 500, "context of 64")])
def test_prompts_that_cannot_be_continued(prompt: str, tokens: int, match: str, trained) -> None:
    with pytest.raises(ValueError, match=match):
        generate(trained[2], prompt, new_tokens=tokens)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="export"):
        load(tmp_path / "nothing")
