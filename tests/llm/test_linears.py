"""GPT-2's transposed layers as torch's: the same numbers, converted, saved, resumed and served as GPT-2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llm import common
from torch import Tensor, nn

import fp8kernels
from fp8kernels.models.causal_lm import load_causal_lm
from fp8kernels.models.linears import as_linears
from fp8kernels.nn.step import layers
from fp8kernels.serving import load

IDS = torch.arange(20)[None]


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=common.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether all tensors of the second are in the first; a tied head may be there once or twice."""
    tied = {"lm_head.weight"}
    return first.keys() - tied == second.keys() - tied and all(
        torch.equal(first[name], second[name]) for name in second
    )


def test_the_numbers_and_the_saved_tensors_stay() -> None:
    original = gpt2()
    model = copy.deepcopy(original)
    replaced = as_linears(model)
    assert len(replaced) == 8
    assert {type(model.get_submodule(name)) for name in replaced} == {nn.Linear}
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (128, 32)
    assert model.state_dict()["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert same(model.state_dict(), original.state_dict())
    with torch.no_grad():
        assert (model(IDS).logits - original(IDS).logits).abs().max() <= 1e-6 * original(IDS).logits.abs().max()
    assert as_linears(model) == []


def test_state_goes_in_as_it_comes_out() -> None:
    model, other = gpt2(), gpt2(seed=1)
    as_linears(model)
    state = other.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    model.load_state_dict(state)
    assert {name: tensor.shape for name, tensor in state.items()} == shapes  # the caller's tensors are left alone
    assert same(model.state_dict(), state)
    square = model.transformer.h[0].attn.c_proj.weight  # 32 x 32: a wrong way round would not show in its shape
    assert torch.equal(square, other.transformer.h[0].attn.c_proj.weight.T)


def test_one_layer_in_two_places_stays_one() -> None:
    model = gpt2()
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    as_linears(model)
    assert model.transformer.h[1].mlp.c_fc is model.transformer.h[0].mlp.c_fc


def test_converted_trained_saved_and_read_by_transformers(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "gpt2")
    common.tokenizer().save_pretrained(tmp_path / "gpt2")
    model, tokenizer = load_causal_lm(tmp_path / "gpt2")
    fp8kernels.convert(model, "hif8-qat", verbose=False)
    assert len(layers(model)) == 8
    step(model)
    resumed, _ = load_causal_lm(tmp_path / "gpt2")
    fp8kernels.convert(resumed, "hif8-qat", verbose=False)
    resumed.load_state_dict(model.state_dict())
    step(model)
    step(resumed)
    assert same(model.state_dict(), resumed.state_dict())

    plain = fp8kernels.without_state(model.state_dict())
    model.save_pretrained(tmp_path / "out", state_dict=plain)
    tokenizer.save_pretrained(tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock.transformer.h[0].attn.c_proj) is not nn.Linear
    assert same(stock.state_dict(), plain)
    again, _ = load_causal_lm(tmp_path / "out")
    assert same(again.state_dict(), plain)


def test_an_exported_one_serves(tmp_path: Path) -> None:
    model = gpt2().bfloat16()
    as_linears(model)
    fp8kernels.convert(model, "hif8-qat", verbose=False)
    step(model)
    fp8kernels.export(model.eval(), tmp_path / "served")
    served = load(tmp_path / "served")
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, model(IDS).logits)


def test_falcons_layers_are_torchs(tmp_path: Path) -> None:
    config = transformers.FalconConfig(
        vocab_size=common.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    torch.manual_seed(0)
    original = transformers.FalconForCausalLM(config).eval()
    model = copy.deepcopy(original)
    assert len(as_linears(model)) == 8
    with torch.no_grad():
        assert (model(IDS).logits - original(IDS).logits).abs().max() <= 1e-6 * original(IDS).logits.abs().max()


def test_other_models_are_left_alone() -> None:
    model = common.model()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    assert as_linears(model) == []
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("target", [["c_fc"], "all-linear"])
def test_lora_on_them(target: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = gpt2()
    as_linears(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
    fp8kernels.convert(adapted, "hif8-qat", verbose=False)
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters()}
    step(adapted)
    moved = {name for name, tensor in adapted.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
