"""Joined serving layers: the same bits as apart, whatever the scales, and a reason wherever layers stay apart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8kernels.formats import get_format
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.nn.inference_joined import JoinedLinear
from fp8kernels.ops import quantize
from fp8kernels.recipe import Role
from fp8kernels.serving.fuse import fuse_for_serving

HIDDEN, LAYERS = 128, 2


def model_of(kind: str, fmt: str = "hif8", *, scaling: str = "static", block: str = "tensor") -> nn.Module:
    """A small decoder of transformers with random weights in 8-bit layers, every layer with scales of its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4 if block == "128x128" else 2, head_dim=32, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, eight_bit(module, fmt, scaling, block))
    return model


def eight_bit(linear: nn.Linear, fmt: str, scaling: str, block: str) -> InferenceLinear:
    role, target = Role(fmt, scaling, block="row" if block == "128x128" else block), get_format(fmt).target
    if scaling == "static":
        role = Role(fmt, scaling)
    made = InferenceLinear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, input_role=role,
        weight_role=Role(fmt, scaling, block=block) if scaling != "static" else role, input_target=target,
    )  # fmt: skip
    coded = quantize(linear.weight, fmt, block=made.weight_role.block)
    made.weight_codes.copy_(coded.codes)
    made.weight_scale.copy_(coded.scale)
    if scaling == "static":
        made.input_scale.fill_(4 / target)
    if linear.bias is not None:
        made.bias = torch.randn_like(linear.bias)
    return made.eval()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Olmo2"])
def test_every_decoder_keeps_its_bits(kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(0, 96, (1, 24))
    prompt, token = logits(model, ids), logits(model, ids[:, :1])
    done = fuse_for_serving(model)
    assert [each.layers for each in done] == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * LAYERS
    assert not any(each.reason for each in done), [str(each) for each in done]
    assert torch.equal(logits(model, ids), prompt)
    assert torch.equal(logits(model, ids[:, :1]), token)


@pytest.mark.parametrize("fmt", ["hif8", "e4m3"])
@pytest.mark.parametrize(("scaling", "block"), [("static", "tensor"), ("current", "row"), ("current", "128x128")])
def test_static_and_current_scales(fmt: str, scaling: str, block: str) -> None:
    model = model_of("Llama", fmt, scaling=scaling, block=block)
    ids = torch.randint(0, 96, (4, 2))  # 8 rows of layers: joined products with parts that are copied
    before = logits(model, ids)
    assert not any(each.reason for each in fuse_for_serving(model))
    assert torch.equal(logits(model, ids), before)


def test_generated_tokens_are_the_same_and_one_product_serves_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8kernels.nn import inference_joined

    model = model_of("Llama")
    ids = torch.randint(0, 96, (1, 8))
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    fuse_for_serving(model)
    made = []
    product = inference_joined.Joined._product
    monkeypatch.setattr(
        inference_joined.Joined, "_product", lambda self, *args: made.append(self) or product(self, *args)
    )
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    assert len(made) == 6 * 2 * LAYERS  # the prompt of 8 rows and five tokens, two products a layer
    assert all(joined._held is None for joined in made), "a result is kept after its last part"


def test_no_bytes_are_added_and_the_state_keeps_its_names() -> None:
    from fp8kernels.nn.inference import nbytes

    model = model_of("Llama")
    state, size = {name: x.clone() for name, x in model.state_dict().items()}, nbytes(model)
    fuse_for_serving(model)
    assert nbytes(model) == size
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], x) for name, x in state.items())


def test_moved_copied_and_loaded_layers_compute_what_they_hold() -> None:
    model, other = model_of("Llama"), model_of("Llama", "hif8")
    for x in other.state_dict().values():
        if x.dtype == torch.uint8:
            x.copy_(x.flip(0))
    ids = torch.randint(0, 96, (1, 1))
    mine, its = logits(model, ids), logits(other, ids)
    assert not torch.equal(mine, its)
    fuse_for_serving(model)
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, ids), its)
    assert torch.equal(logits(copied, ids), mine)
    assert torch.equal(logits(copied.to("cpu", torch.bfloat16), ids), mine)
    assert not any(each.reason for each in fuse_for_serving(model)), "layers that were loaded anew join again"
    assert torch.equal(logits(model, ids), its)


def test_layers_that_differ_stay_apart_with_the_reason() -> None:
    model = model_of("Llama")
    first = model.model.layers[0]
    first.self_attn.k_proj.input_scale.mul_(2)
    first.mlp.up_proj.register_forward_hook(lambda *_: None)
    done = fuse_for_serving(model)
    assert "different scales" in done[0].reason and "hooks" in done[1].reason
    assert type(first.self_attn.q_proj) is InferenceLinear and type(first.mlp.gate_proj) is InferenceLinear
    assert isinstance(model.model.layers[1].mlp.gate_proj, JoinedLinear)
    assert "already" in fuse_for_serving(model)[-1].reason


def test_parts_called_alone_or_out_of_order_are_right() -> None:
    model = model_of("Llama")
    mlp = model.model.layers[0].mlp
    x, y = torch.randn(1, HIDDEN).bfloat16(), torch.randn(1, HIDDEN).bfloat16()
    gate, up, other = mlp.gate_proj(x), mlp.up_proj(x), mlp.up_proj(y)
    fuse_for_serving(model)
    assert torch.equal(mlp.up_proj(y), other)
    assert torch.equal(mlp.gate_proj(x), gate)
    assert torch.equal(mlp.up_proj(y), other)  # the gate was asked for x
    changed = x.clone()
    mlp.gate_proj(changed)
    changed.copy_(y)  # up was never asked for it
    assert not torch.equal(mlp.gate_proj(changed), gate)
    assert torch.equal(mlp.up_proj(changed), other)
    assert torch.equal(up, mlp.up_proj(x))


def test_a_loaded_model_reads_aligned_weights_and_gives_its_head_dense_rows(native_folder: Path) -> None:
    from fp8kernels.serving import load
    from fp8kernels.serving.eight_bit import ALIGNMENT

    model = load(native_folder)
    held = [x for x in (*model.parameters(), *model.buffers()) if x.nbytes > ALIGNMENT]
    offsets = {x.untyped_storage().data_ptr() % ALIGNMENT for x in held}
    assert offsets == {0}, "weights begin where a cache line does"
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    hidden = model.config.hidden_size
    with torch.inference_mode():
        model(torch.arange(2, 34)[None], logits_to_keep=1)
    assert seen == [(hidden, hidden, 1)], "the head's weight is copied for a slice"
