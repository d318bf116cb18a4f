"""Which norms and MLPs convert fuses: transformers' and timm's blocks, and nothing whose source says otherwise."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from fusions import QAT, read_by, reasons
from nn.blocks import Block, Heads
from torch import Tensor, nn
from torch.nn import functional as F

import fp8kernels
from fp8kernels import Role, convert, revert
from fp8kernels.convert import plan_fusion
from fp8kernels.convert.fuse import activation_of
from fp8kernels.nn.producer import Producer
from fp8kernels.nn.step import layers

QKV = ["q_proj", "k_proj", "v_proj"]


def decoder(family: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def vit(activation: str = "gelu") -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        hidden_act=activation,
    )
    torch.manual_seed(0)
    return transformers.ViTModel(config)


def timm_like() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if isinstance(model, nn.Sequential):
        return model(torch.randn(2, 5, 64, generator=generator).to(dtype)).square().mean()
    if hasattr(model, "lm_head"):
        ids = torch.randint(0, 61, (2, 9), generator=generator)
        return model(input_ids=ids, labels=ids).loss
    return model(torch.randn(2, 3, 16, 16, generator=generator).to(dtype)).last_hidden_state.square().mean()


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for n in range(3):
        loss = loss_of(model, n)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


DECODER = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    "mlp": ["down_proj"],
}
VIT = {"layernorm_before": QKV, "layernorm_after": ["fc1"], "mlp": ["fc2"]}
TIMM = {"norm1": ["qkv"], "norm2": ["fc1"], "mlp": ["fc2"]}
MODELS = {
    "Llama": (lambda: decoder("Llama"), "model.layers.", DECODER),
    "Qwen2": (lambda: decoder("Qwen2"), "model.layers.", DECODER),
    "Qwen3": (lambda: decoder("Qwen3"), "model.layers.", DECODER),
    "Mistral": (lambda: decoder("Mistral"), "model.layers.", DECODER),
    "ViT": (vit, "layers.", VIT),
    "timm": (timm_like, "", TIMM),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused(name: str) -> None:
    make, prefix, wanted = MODELS[name]
    model = make()
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    convert(model, QAT, verbose=False)
    assert read_by(model) == {f"{prefix}{n}.{part}": names for n in range(2) for part, names in wanted.items()}
    plain = convert(make(), QAT, fuse=False, verbose=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert set(fp8kernels.without_state(model.state_dict())) == set(keys)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "ViT", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_is_that_of_the_unfused_model(name: str, dtype: torch.dtype) -> None:
    make = MODELS[name][0]
    fused, plain = (convert(make().to(dtype), QAT, fuse=fuse, verbose=False) for fuse in (True, False))
    assert train(fused) == train(plain)
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [row.scale for row in fp8kernels.report(fused)] == [row.scale for row in fp8kernels.report(plain)]


@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_gradient_checkpointing_of_transformers(name: str) -> None:
    make = MODELS[name][0]
    fused, plain = (convert(make(), QAT, fuse=fuse, verbose=False).train() for fuse in (True, False))
    fused.gradient_checkpointing_enable()
    assert train(fused) == train(plain)


def test_generation_is_that_of_the_unfused_model() -> None:
    fused, plain = (convert(decoder("Qwen3"), QAT, fuse=fuse, verbose=False) for fuse in (True, False))
    train(fused), train(plain)
    ids = torch.tensor([[1, 2, 3]])
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(fused.eval().generate(ids, **kwargs), plain.eval().generate(ids, **kwargs))


def test_the_table_says_what_is_fused_and_why_the_rest_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    convert(decoder("Llama"), QAT)
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "6 of 7 norms and MLPs",
        "model.layers.*.input_layernorm",
        "q_proj, k_proj, v_proj",
        "read in another",
    ):
        assert part in said, said
    convert(timm_like(), QAT, fuse=False)
    assert "norms and MLPs" not in capsys.readouterr().out


def test_converting_twice_fuses_nothing_more() -> None:
    model = convert(timm_like(), QAT, fuse=False, verbose=False)
    convert(model, QAT, verbose=False)
    assert read_by(model) == {}
    assert all(fusion.reason is None for fusion in plan_fusion(model))
    revert(model)
    convert(model, QAT, verbose=False)
    assert len(read_by(model)) == 6
    assert {fusion.reason for fusion in plan_fusion(model) if isinstance(fusion.module, Producer)} == {"already fused"}


def test_readers_that_are_not_all_alike() -> None:
    other = QAT.replace(input=Role("e4m3"))
    assert reasons(Heads(), QAT.with_override("k", other))["norm"] == "q and k have different recipes for their input"
    assert reasons(Heads(), QAT.with_override("v", QAT.replace(window=9)))["norm"] is not None
    assert reasons(Heads(), QAT.with_override("k", None))["norm"] == "k is a Linear that is not 8-bit"
    assert reasons(Heads(), filter=lambda module, name: name != "mlp.down_proj")["mlp"] == "down_proj is not converted"
    weights = QAT.with_override("k", QAT.replace(weight=Role("e4m3"), grad=Role("e5m2")))
    assert reasons(Heads(), weights)["norm"] is None


def test_activations() -> None:
    import transformers.activations as known

    names = {
        nn.SiLU(): "silu",
        nn.ReLU(): "relu",
        nn.GELU(): "gelu",
        nn.GELU("tanh"): "gelu_tanh",
        nn.Tanh(): None,
        known.ACT2FN["silu"]: "silu",
        known.ACT2FN["gelu"]: "gelu",
        known.ACT2FN["gelu_pytorch_tanh"]: "gelu_tanh",
        known.ACT2FN["gelu_new"]: "gelu_tanh",
        known.ACT2FN["quick_gelu"]: None,
        known.GELUActivation(use_gelu_python=True): None,
    }
    x = torch.linspace(-6, 6, 101)
    functions = {
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    for module, name in names.items():
        assert activation_of(module) == name, module
        if name is not None:
            torch.testing.assert_close(module(x), functions[name](x), rtol=1e-6, atol=1e-6)
    assert reasons(vit("quick_gelu"))["layers.0.mlp"] == "no kernel computes QuickGELUActivation"


def test_a_shared_block_trains_as_unfused() -> None:
    def looped(*, fuse: bool) -> nn.Module:
        torch.manual_seed(0)
        block = Block()
        return convert(nn.Sequential(block, block), QAT, fuse=fuse, verbose=False)

    fused, plain = looped(fuse=True), looped(fuse=False)
    assert train(fused) == train(plain)
    assert len(read_by(fused)) == 3
    assert len(layers(fused)) == 4
