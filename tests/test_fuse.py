"""Which norms and MLPs convert fuses: transformers' and timm's blocks, and nothing whose source says otherwise."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from nn.blocks import Block, Gated, Heads, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

import fp8kernels
from fp8kernels import Role, convert, get_recipe, revert
from fp8kernels.convert import plan_fusion
from fp8kernels.convert.fuse import activation_of
from fp8kernels.nn.producer import Producer
from fp8kernels.nn.step import layers

QAT = get_recipe("hif8-qat").replace(window=4)
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


def read_by(model: nn.Module) -> dict[str, list[str]]:
    """The readers of every fused module, by name."""
    return {
        name: [place.name for place in module.fp8_places]
        for name, module in model.named_modules()
        if isinstance(module, Producer)
    }


def reasons(model: nn.Module, recipe: object = QAT, **how: object) -> dict[str, str | None]:
    convert(model, recipe, fuse=False, verbose=False, **how)  # type: ignore[arg-type]
    return {fusion.name: fusion.reason for fusion in plan_fusion(model)}


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


class Base(nn.Module):
    """A norm, two layers, and a forward that each test writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), Inner()
        self.a, self.b, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.plain = True


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        size = x.shape[0] if x.dim() else 0
        return self.deep(x) * scale * size


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x))


class Keyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.inner(x=h, scale=2.0) + self.a(h)
        h = y * 2
        return self.out(h.relu())


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            x = self.a(x)
        else:
            x = self.b(x)
        return x.relu()


class EarlyReturn(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            return self.a(x)
        with contextlib.nullcontext():
            x = self.b(x)
        return x.relu()


FOLLOWED = {Nested: ["a"], Keyword: ["deep", "a"], Branches: ["a", "b"], EarlyReturn: ["a", "b"]}


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.a(h)


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        other = h
        return self.a(h) + other


class OneBranchKeeps(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            x = self.a(x)
        return x.relu()


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        for layer in (self.a, self.b):
            h = layer(h)
        return h


class Comprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return sum(layer(h) for layer in (self.a, self.b))


class Closure(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return (lambda: self.a(h))()


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h += 1
        return self.a(h)


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.go(self.norm(x))

    def go(self, x: Tensor) -> Tensor:
        return self.a(x)


class Twice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)) + self.b(self.norm(2 * x))


class Packed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(*[self.norm(x)])


class Sliced(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)[:1])


class Unused(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.a(x) if h.shape[0] else x


REFUSED = {
    Residual: "read in another way too: return h + self.a(h)",
    Alias: "read in another way too: other = h",
    OneBranchKeeps: "read in another way too: return x.relu()",
    Loop: "read in another way too: for layer in",
    Comprehension: "read in another way too: return sum(",
    Closure: "read in another way too: return (lambda",
    InPlace: "read in another way too: h += 1",
    Method: "go, which is no module",
    Twice: "calls it 2 times",
    Packed: "read in another way too: return self.a(*[self.norm(x)])",
    Sliced: "read in another way too: return self.a(self.norm(x)[:1])",
    Unused: "nothing reads its result",
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_the_source_shows_where_a_result_goes(kind: type[Base]) -> None:
    model = convert(kind(), QAT, verbose=False)
    assert read_by(model) == {"norm": FOLLOWED[kind]}
    plain = convert(kind(), QAT, fuse=False, verbose=False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    for net in (model, plain):
        for net.plain in (True, False):
            net(x).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_source_says_otherwise(kind: type[Base]) -> None:
    assert REFUSED[kind] in (reasons(kind())["norm"] or "fused")
    model = convert(kind(), QAT, verbose=False)
    assert read_by(model) == {}


def test_what_has_no_source_or_another_forward_stays() -> None:
    model = Nested()
    model.forward = lambda x: model.a(model.norm(x))  # type: ignore[method-assign]
    assert reasons(model)["norm"] == "forward of this Nested was replaced"
    namespace: dict[str, object] = {"Base": Base}
    exec("class Hidden(Base):\n    def forward(self, x):\n        return self.a(self.norm(x))", namespace)
    hidden = namespace["Hidden"]
    assert "has no source" in str(reasons(hidden())["norm"])  # type: ignore[operator]

    class Other(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Normed(Mlp):
        pass

    assert reasons(nn.Sequential(Other(16, 32))) == {}
    normed = Normed(16, 32)
    assert reasons(nn.Sequential(normed))["0"] is None
    normed = Normed(16, 32)
    normed.norm = nn.LayerNorm(32)
    assert reasons(nn.Sequential(normed))["0"] == "it has a norm between activation and fc2"


def test_modules_that_stand_in_two_places() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Nested(), Nested()
            self.second.norm = self.first.norm
            self.third, self.fourth = Nested(), Nested()
            self.fourth.a = self.third.a

        def forward(self, x: Tensor) -> Tensor:
            return self.fourth(self.third(self.second(self.first(x))))

    found = reasons(Shared())
    assert found["first.norm"] == "it is called from several places"
    assert found["third.norm"] == "a is called from several places"


def test_norms_over_more_than_the_last_dimension() -> None:
    model = Nested()
    model.norm = nn.LayerNorm((4, 16))
    assert reasons(model)["norm"] == "it normalises over 2 dimensions"


def test_a_shared_block_trains_as_unfused() -> None:
    def looped(*, fuse: bool) -> nn.Module:
        torch.manual_seed(0)
        block = Block()
        return convert(nn.Sequential(block, block), QAT, fuse=fuse, verbose=False)

    fused, plain = looped(fuse=True), looped(fuse=False)
    assert train(fused) == train(plain)
    assert len(read_by(fused)) == 3
    assert len(layers(fused)) == 4
