"""New weights of a training, streamed into what runs: our loaded model, and SGLang's layers behind the plug-in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving import common

from fp8kernels.export import export
from fp8kernels.export.stream import pairs, stream
from fp8kernels.nn.inference_joined import JoinedLinear
from fp8kernels.serving import load, update
from fp8kernels.training.step import adamw, train_step
from fp8kernels.training.tokens import random_batches, token_stream

FORMATS = ("native", "compressed-tensors", "compressed-tensors-dynamic", "fp8")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def later(hif8: Any) -> Any:
    """`hif8` a few steps of training later."""
    model = copy.deepcopy(hif8).train()
    optimizer = adamw(model, 3e-3)
    batches = random_batches(token_stream(common.tokenizer(), common.TEXT), 4, 32, seed=1)
    for _ in range(3):
        train_step(model, optimizer, next(batches))
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, tensor in model.state_dict().items():
        assert not name.startswith(prefix) or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("format", "head"), [*((format, None) for format in FORMATS), ("native", "hif8"), ("fp8", "e4m3")]
)
def test_an_updated_model_answers_as_one_loaded_anew(
    hif8: Any, later: Any, format: str, head: str | None, prompt_ids: torch.Tensor, tmp_path: Path
) -> None:
    export(hif8, tmp_path / "old", format=format, tokenizer=common.tokenizer())
    export(later, tmp_path / "new", format=format, tokenizer=common.tokenizer())
    running, fresh = load(tmp_path / "old", head=head), load(tmp_path / "new", head=head)
    before = logits(running, prompt_ids)
    addresses = {name: tensor.data_ptr() for name, tensor in running.state_dict().items()}
    joined = [name for name, module in running.named_modules() if isinstance(module, JoinedLinear)]
    done = update(running, stream(later, format=format))
    expected = logits(fresh, prompt_ids)
    assert not torch.equal(before, expected), "the training should have changed something"
    assert torch.equal(logits(running, prompt_ids), expected)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(running.state_dict()[name], tensor), name
    one = prompt_ids[:, :1]  # few rows: q, k and v are one product, with the new weights
    assert joined and torch.equal(logits(running, one), logits(fresh, one))
    assert all(running.get_submodule(name).joined.codes is not None for name in joined)
    assert {name: tensor.data_ptr() for name, tensor in running.state_dict().items()} == addresses
    assert len(done.layers) == 14 + (head is not None) and "8 bits" in str(done)


@pytest.fixture
def running(native_folder: Path) -> Any:
    return load(native_folder)


def items(model: Any, format: str = "native") -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    return {name: (tensor, scale) for name, tensor, scale in stream(model, format=format)}


def given(found: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> Any:
    return ((name, tensor, scale) for name, (tensor, scale) in found.items())


@pytest.mark.parametrize(
    ("spoil", "says"),
    (
        (
            lambda f: f.update({f"{UP}.weight_codes": (f[f"{UP}.weight_codes"][0][:-1], f[f"{UP}.weight_codes"][1])}),
            "is",
        ),
        (lambda f: f.update({f"{UP}.weight_codes": (f[f"{UP}.weight_codes"][0], torch.zeros(1, 1))}), "weight_scale"),
        (
            lambda f: f.update({f"{UP}.weight_codes": (f[f"{UP}.weight_codes"][0], torch.full((1, 1), float("nan")))}),
            "nan",
        ),
        (lambda f: f.update({f"{UP}.weight_codes": (f[f"{UP}.weight_codes"][0], torch.ones(3, 1))}), r"\(3, 1\)"),
        (lambda f: f.update({f"{UP}.weight_codes": (f[f"{UP}.weight_codes"][0], None)}), "without a scale"),
        (lambda f: f.update({f"{UP}.input_scale": (torch.zeros(1, 1), None)}), "input_scale"),
        (lambda f: f.pop(f"{UP}.input_scale"), f"of {UP} only"),
    ),
)
def test_a_layer_that_is_refused_stays_as_it_was(running: Any, later: Any, spoil: Any, says: str) -> None:
    found, before = items(later), state(running)
    spoil(found)
    with pytest.raises(ValueError, match=says):
        update(running, given(found))
    unchanged(running, before, f"{UP}.")
    first = "model.layers.0.self_attn.q_proj.weight_codes"  # came before it, whole
    assert torch.equal(running.state_dict()[first], found[first][0])


def test_a_name_that_the_model_does_not_have_is_refused(running: Any, later: Any) -> None:
    found, before = items(later), state(running)
    first = {"model.layers.9.mlp.up_proj.weight_codes": found[f"{UP}.weight_codes"]} | found
    with pytest.raises(ValueError, match=r"has no 'model.layers.9.mlp.up_proj.weight_codes'"):
        update(running, given(first))
    unchanged(running, before)


def test_nothing_changes_where_the_first_tensor_is_refused(running: Any, later: Any) -> None:
    before = state(running)
    with pytest.raises(ValueError, match="holds codes of hif8"):
        update(running, stream(later, format="compressed-tensors"))
    unchanged(running, before)


def test_numbers_that_are_not_finite_are_refused(running: Any, later: Any) -> None:
    found, before = items(later), state(running)
    name = "model.norm.weight"
    found[name] = (torch.full_like(found[name][0], float("inf")), None)
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite.*hold new weights; update again"):
        update(running, given(found))
    assert torch.equal(running.state_dict()[name], before[name])


def test_codes_that_are_not_numbers_are_refused(running: Any, later: Any) -> None:
    from fp8kernels.formats import HIF8

    found = items(later)
    codes, scale = found[f"{UP}.weight_codes"]
    codes = codes.clone()
    codes[0, 0] = int(HIF8.table().isnan().nonzero()[0])
    found[f"{UP}.weight_codes"] = (codes, scale)
    with pytest.raises(ValueError, match=f"{UP} has codes that are not numbers"):
        update(running, given(found))


def test_a_stream_that_breaks_off_is_named(running: Any, later: Any, prompt_ids: torch.Tensor) -> None:
    found = items(later)
    left_out = {name: found.pop(name) for name in list(found) if "layers.1.mlp.down_proj" in name}
    with pytest.raises(ValueError, match=r"brought nothing for 'model.layers.1.mlp.down_proj'.*update again"):
        update(running, given(found))
    found.update(left_out)
    update(running, given(found))
    assert torch.isfinite(logits(running, prompt_ids)).all()


def test_a_plain_model_is_refused(later: Any) -> None:
    with pytest.raises(ValueError, match="no layers that hold 8-bit codes"):
        update(common.plain(), stream(later, format="native"))


def test_the_layers_of_the_plug_ins_take_the_stream(later: Any, native_folder: Path, tmp_path: Path) -> None:
    """served_linear under both plug-ins: first the folder, then the stream, through the same loaders."""
    from fp8kernels.export.config import entries, quantization_config
    from fp8kernels.export.layout import read_manifest
    from fp8kernels.integrations.served_linear import apply, create, layer_entry

    layers = entries(quantization_config(read_manifest(native_folder).layers))
    parent, parts = "model.layers.0.mlp", ("gate_proj", "up_proj")
    entry = layer_entry(layers, f"{parent}.gate_up_proj", {"gate_up_proj": list(parts)})
    assert entry is not None
    layer, rows = torch.nn.Module(), common.SIZE.intermediate

    def loader(parameter: Any, tensor: torch.Tensor, part: int) -> None:
        if getattr(parameter, "output_dim", None) is None:
            parameter.data[part].copy_(tensor[0])
        else:
            parameter.data[part * rows : (part + 1) * rows].copy_(tensor)

    create(layer, entry, name=parent, in_local=common.SIZE.hidden, out_local=[rows, rows], weight_loader=loader)

    def feed(tensors: Any) -> None:
        for name, tensor in tensors:
            owner, _, key = name.rpartition(".")
            if owner.rpartition(".")[0] == parent and owner.rpartition(".")[2] in parts:
                parameter = getattr(layer, key)
                parameter.weight_loader(parameter, tensor, parts.index(owner.rpartition(".")[2]))

    feed(load_file(native_folder / "model.safetensors").items())
    x = torch.randn(3, common.SIZE.hidden, generator=torch.Generator().manual_seed(0))
    before = apply(layer, x)
    feed(pairs(stream(later, format="native")))
    export(later, tmp_path / "new")
    fresh = load(tmp_path / "new")
    expected = torch.cat([fresh.get_submodule(f"{parent}.{part}")(x) for part in parts], dim=-1)
    after = apply(layer, x)
    assert torch.equal(after, expected) and not torch.equal(before, after)
