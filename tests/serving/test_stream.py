"""stream: the bytes of an export without a file, a layer at a time, and a model that stays as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import run
from safetensors.torch import load_file
from serving import common

from fp8kernels.convert import convert
from fp8kernels.export import LayerPlan, calibrate, export, pairs, stream
from fp8kernels.export.merged_view import merged_view

FORMATS = ("native", "compressed-tensors", "compressed-tensors-dynamic", "compressed-tensors-block", "fp8")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (tensor, other))), name


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_are_those_of_the_file(hif8: Any, tmp_path: Path, format: str) -> None:
    export(hif8, tmp_path / "out", format=format)
    found = list(stream(hif8, format=format))
    same(dict(pairs(iter(found))), load_file(tmp_path / "out" / "model.safetensors"))
    codes = [(name, scale) for name, _, scale in found if scale is not None]
    blocks = format.endswith("block")  # 64 rows of k and v are half a block: q, k and v stay in high precision
    assert len(codes) == (4 if blocks else 7) * common.SIZE.layers
    first = "o_proj" if blocks else "q_proj"
    assert codes[0][0] == f"model.layers.0.self_attn.{first}." + ("weight_codes" if format == "native" else "weight")


def test_a_layer_is_rounded_when_it_is_asked_for_and_not_kept(hif8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    plain = LayerPlan.tensors
    monkeypatch.setattr(LayerPlan, "tensors", lambda self: made.append(self.name) or plain(self))
    alive: list[weakref.ref[torch.Tensor]] = []
    for name, tensor, scale in stream(hif8):
        if scale is not None:
            assert name == f"{made[-1]}.weight"
            assert len(made) == len(alive) + 1
            assert sum(ref() is not None for ref in alive) == 0, "an earlier layer is still in memory"
            alive.append(weakref.ref(tensor))
        del tensor, scale
        gc.collect()
    assert len(made) == 7 * common.SIZE.layers


def test_the_model_is_not_changed(hif8: Any) -> None:
    model = copy.deepcopy(hif8).train()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    for format in FORMATS:
        for _ in stream(model, format=format):
            pass
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    same(dict(model.state_dict()), before)


def test_tied_embeddings_come_once(tmp_path: Path) -> None:
    model = common.trained("hif8-qat", tie_word_embeddings=True)
    export(model, tmp_path / "out", format="compressed-tensors")
    names = [name for name, _, _ in stream(model)]
    assert len(names) == len(set(names))
    same(dict(pairs(stream(model))), load_file(tmp_path / "out" / "model.safetensors"))
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_adapters_are_merged_and_stay(hif8: Any, tmp_path: Path, kind: str, format: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"lora": {}, "dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}}[kind]
    model = peft.get_peft_model(
        copy.deepcopy(hif8),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options),
    )
    assert (merged_view(model) is not None) == (kind == "lora")
    before = copy.deepcopy(model.state_dict())
    found = dict(pairs(stream(model, format=format)))
    same(dict(model.state_dict()), before)
    export(model, tmp_path / "out", format=format)
    same(found, load_file(tmp_path / "out" / "model.safetensors"))
    if format == "native":
        return
    plain = dict(pairs(stream(hif8)))
    assert found.keys() == plain.keys()
    changed = {name for name in found if name.endswith("weight") and not torch.equal(found[name], plain[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "down_proj"}


def sharded(rank: int) -> tuple[list[str], bool]:
    """Names of tensors that differ from those of the plain model's stream, and whether weights are shards after it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = convert(common.plain(), "hif8-qat", verbose=False)
    calibrate(model, [common.prompt_ids()])
    whole = dict(pairs(stream(model)))
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    gathered = dict(pairs(stream(model)))
    differ = [name for name in whole if not torch.equal(whole[name].float(), gathered[name].float())]
    missing = [name for name in whole if name not in gathered]
    return [*differ, *missing], all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_shards_of_fsdp_are_gathered_a_layer_at_a_time() -> None:
    assert run(sharded, 2) == [([], True), ([], True)]


def test_a_view_of_lora_shares_every_weight(hif8: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(hif8), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    view = merged_view(model)
    assert view is not None
    held = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} <= held
    assert [name for name, _ in view.named_parameters()] == [name for name, _ in hif8.named_parameters()]


def test_what_cannot_be_streamed_is_told_before_the_first_tensor(hif8: Any) -> None:
    with pytest.raises(ValueError, match="no 8-bit layers"):
        stream(common.plain())
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        stream(hif8, dtype=torch.float16)
    with pytest.raises(ValueError, match="compressed"):
        stream(hif8, format="compressed")
    broken = copy.deepcopy(hif8)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight .* NaN"):
        stream(broken)
