"""transformers.Trainer: nothing of ours in the loop but convert, and the bits of a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.common import ACCUMULATED, STEPS, arguments, bare, logged, rows
from safetensors.torch import load_file
from setups.models import batch
from setups.runs import FULL, RECOMPUTED, converted, same, same_models, state
from torch import nn

from fp8kernels import convert, without_state
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import is_state

BATCHES = STEPS * ACCUMULATED
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")


def trained(net: nn.Module, folder: Path, family: str = "llama", *, resume: Any = None, **changes: Any) -> Any:
    trainer = transformers.Trainer(
        model=net,
        args=arguments(folder, **changes),
        train_dataset=rows(family, BATCHES),
        eval_dataset=rows(family, 2),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family, bf16", [("llama", False), ("llama", True), ("qwen3", True), ("bert", True)])
def test_bits_of_a_bare_loop(family: str, tmp_path: Path, *, bf16: bool) -> None:
    by_hand, net = converted(family), converted(family)
    batches = [batch(family, seed) for seed in range(BATCHES)]
    losses = bare(by_hand, batches, shifted=family != "bert", autocast=bf16)
    trainer = trained(net, tmp_path, family, bf16=bf16)
    assert logged(trainer) == losses
    same_models(by_hand, net)
    assert {int(layer.fp8_step) for layer in layers(net)} == {STEPS}  # one commit for two micro-batches


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path: Path, *, reentrant: bool) -> None:
    plain, net = converted("llama"), converted("llama")
    losses = logged(trained(plain, tmp_path, bf16=True))
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert logged(trained(net, tmp_path, bf16=True, **how)) == losses
    same_models(plain, net, but=RECOMPUTED)
    counted = [sum(int(layer.fp8_counters[0, 0]) for layer in layers(model)) for model in (plain, net)]
    assert counted[1] > counted[0], "nothing was recomputed"


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    """Rows in the order of the trainer's own random sampler; the model that resumes had other weights."""
    net, resumed = converted("llama"), converted("llama", seed=1)
    how = {"save_strategy": "steps", "save_steps": STEPS // 2, "bf16": True, "train_sampling_strategy": "random"}
    whole = trained(net, tmp_path, **how)
    again = trained(resumed, tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"), **how)
    assert logged(again) == logged(whole)
    same_models(net, resumed, but=RECOMPUTED)  # weights are kept as codes only after the first commit of a process


def test_evaluation_within_training_writes_nothing(tmp_path: Path) -> None:
    plain, net = converted("llama"), converted("llama")
    losses = logged(trained(plain, tmp_path))
    trainer = trained(net, tmp_path, eval_strategy="steps", eval_steps=1)
    assert logged(trainer) == losses
    assert len(logged(trainer, "eval_loss")) == STEPS
    same_models(plain, net)
    before = state(net)
    trainer.evaluate()
    trainer.predict(rows("llama", 1))
    same(before, state(net))


def test_the_best_model_comes_back_with_its_scales(tmp_path: Path) -> None:
    net = converted("llama")
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 3.0}
    trainer = trained(net, tmp_path, load_best_model_at_end=True, **how)
    best = trainer.state.best_model_checkpoint
    assert trainer.state.best_global_step < STEPS, "a learning rate this high makes the model worse"
    saved = load_file(Path(best) / "model.safetensors")
    same(saved, {key: value for key, value in net.state_dict().items() if key in saved})
    assert set(state(net)) <= saved.keys()
    assert {int(layer.fp8_step) for layer in layers(net)} == {trainer.state.best_global_step}


def test_pretrained_files_travel_between_plain_and_converted_models(tmp_path: Path) -> None:
    net = converted("llama")
    trained(net, tmp_path)
    net.save_pretrained(tmp_path / "converted")
    plain, report = type(net).from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not layers(plain)
    assert set(report["unexpected_keys"]) == set(state(net))  # HF names what it leaves out, and takes the rest
    assert not report["missing_keys"] and not report["mismatched_keys"]
    same(plain.state_dict(), without_state(net.state_dict()))

    again = convert(plain, FULL, verbose=False)
    assert not any(layer.fp8_scale.any() for layer in layers(again))
    again.load_state_dict(load_file(tmp_path / "converted" / "model.safetensors"), strict=True)
    same_models(net, again)
    out = [model.eval()(**batch("llama", 0)).logits for model in (net, again)]
    assert torch.equal(*out)

    net.save_pretrained(tmp_path / "plain", state_dict=without_state(net.state_dict()))
    assert not any(map(is_state, load_file(tmp_path / "plain" / "model.safetensors")))
    _, report = type(net).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
