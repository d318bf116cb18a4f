"""The native checkpoint: what is written is what was trained; what is damaged is refused before anything changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from recipes import ANYWHERE
from safetensors.torch import load_file, save_file
from torch import nn

from fp8kernels.convert import convert
from fp8kernels.export import check, export, load_into, pack
from fp8kernels.export import write as write_module
from fp8kernels.export.layout import MANIFEST, WEIGHTS, file_stamp
from fp8kernels.nn.hold import hold_high
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.recipe import get_recipe

WIDTH = 128  # divides by every block


class Net(nn.Module):
    """An embedding, two linears (one with bias), a norm with a buffer, and a head that shares the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, WIDTH)
        self.first = nn.Linear(WIDTH, 256)
        self.norm = nn.BatchNorm1d(256)
        self.second = nn.Linear(256, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, 40, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(self.embedding(tokens)))
        return self.lm_head(self.second(x.relu()))


TOKENS = torch.arange(32) % 40


def trained(recipe: str) -> Net:
    """Converted, and two optimizer steps on, so that delayed scales stand."""
    model = convert(Net(), recipe, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export(trained("hif8-qat"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("recipe", sorted(ANYWHERE))
def test_a_loaded_model_computes_what_the_trained_one_does(recipe: str, tmp_path: Path) -> None:
    model = trained(recipe)
    with torch.no_grad():
        wanted = model(TOKENS)
    export(model, tmp_path / "model", dtype=torch.float32)
    loaded = load_into(Net(), tmp_path / "model")
    assert isinstance(loaded.first, InferenceLinear)
    assert isinstance(loaded.second, InferenceLinear)
    assert not hasattr(loaded.first, "weight")
    with torch.no_grad():
        found = loaded(TOKENS)
    assert torch.equal(found, wanted), f"largest difference {(found - wanted).abs().max():.3g}"


def test_weights_take_a_byte_each_and_state_stays_home(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert tensors["first.weight_codes"].dtype == torch.uint8
    assert tensors["first.weight_codes"].shape == (256, WIDTH)
    assert tensors["first.weight_scale"].shape == tensors["first.input_scale"].shape == (1, 1)
    assert float(tensors["first.input_scale"]) > 0, "two optimizer steps leave a delayed scale"
    assert tensors["first.bias"].dtype == tensors["embedding.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in tensors, "it is the embedding's tensor"
    assert not any("fp8_" in name or name == "first.weight" for name in tensors)


def test_shared_tensors_stay_shared(folder: Path) -> None:
    loaded = load_into(Net(), folder)
    assert loaded.lm_head.weight.data_ptr() == loaded.embedding.weight.data_ptr()


def test_exporting_changes_neither_the_model_nor_its_mode(tmp_path: Path) -> None:
    model = trained("hif8-qat").train()
    before = copy.deepcopy(model.state_dict())
    export(model, tmp_path / "model")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_history_inputs_are_scaled_by_their_own_amax(tmp_path: Path) -> None:
    model = convert(Net(), "hif8-qat", verbose=False).eval()
    manifest = export(model, tmp_path / "model", dtype=torch.float32).manifest
    assert manifest is not None
    assert manifest.layers["first"].input_scaling == "current"
    with torch.no_grad():
        assert torch.equal(load_into(Net(), tmp_path / "model")(TOKENS), model(TOKENS))


def test_an_earlier_export_is_replaced_and_other_folders_are_not(folder: Path, tmp_path: Path) -> None:
    (folder / "note.txt").write_text("stale")
    export(trained("e4m3-row"), folder)
    assert check(folder).recipe == "e4m3-row"
    assert not (folder / "note.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="mine"):
        export(trained("hif8-qat"), mine)
    assert (mine / "thesis.txt").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["mine", "model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_interrupted_export_leaves_nothing_and_keeps_the_old_one(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stamp(path: Path) -> tuple[int, str]:
        assert path.stat().st_size > 0, "something was on disk already"
        raise error

    monkeypatch.setattr(write_module, "file_stamp", stamp)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(type(error)):
            export(trained("e4m3-row"), out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_swap_puts_the_old_folder_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export(trained("e4m3-row"), folder)
    monkeypatch.undo()
    assert check(folder).recipe == "hif8-qat"
    assert os.listdir(folder.parent) == ["model"]


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def be_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"first.weight": [1.0]}))
    restamp(folder)


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["third.bias"] = tensors.pop("first.bias")
    save_file(tensors, folder / WEIGHTS)
    restamp(folder)


def retype_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["first.weight_scale"] = tensors["first.weight_scale"].to(torch.bfloat16)
    save_file(tensors, folder / WEIGHTS)
    restamp(folder)


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["first.bias"] = torch.zeros(255, dtype=torch.bfloat16)
    save_file(tensors, folder / WEIGHTS)
    restamp(folder)


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def lead_out_of_the_folder(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"].update({"../secret": [1, "0"]}))


def come_from_the_future(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(version=99))


def know_no_format(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["layers"]["first"].update(weight_fmt="int4"))


def forget_codes(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["layers"].update(norm=manifest["layers"]["first"]))


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def restamp(folder: Path) -> None:
    """As one would who wants the change to go unseen."""
    edit(folder, lambda manifest: manifest["files"].update({WEIGHTS: file_stamp(folder / WEIGHTS)}))


DAMAGE = {
    cut: "truncated",
    flip: "sha256",
    be_a_pickle: "safetensors",
    rename_tensor: "first.bias",
    retype_tensor: "first.weight_scale.*bfloat16",
    reshape_tensor: "first.bias.*255",
    lose_weights: "missing",
    lose_manifest: "no fp8kernels checkpoint",
    break_manifest: "JSON",
    lead_out_of_the_folder: "plain file name",
    come_from_the_future: "layout 99",
    know_no_format: "int4",
    forget_codes: "norm.weight_codes",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_untouched(damage, folder: Path) -> None:
    damage(folder)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=DAMAGE[damage]) as raised:
        load_into(model, folder)
    assert str(folder) in str(raised.value), "the message names the place"
    assert type(model.first) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_decodes_nothing_is_refused(scale: float, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["second.weight_scale"].fill_(scale)
    save_file(tensors, folder / WEIGHTS)
    restamp(folder)
    model = Net()
    with pytest.raises(ValueError, match=r"second\.weight_scale"):
        load_into(model, folder)
    assert type(model.second) is nn.Linear


def test_another_model_is_refused_untouched(folder: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(256, WIDTH + 1, bias=False)

    wider = Other()
    with pytest.raises(ValueError, match=r"second\.weight_codes.*129"):
        load_into(wider, folder)
    assert type(wider.first) is nn.Linear
    without = Net()
    del without.second
    with pytest.raises(ValueError, match="'second'"):
        load_into(without, folder)
    more = Net()
    more.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra"):
        load_into(more, folder)
    odd = Net()
    odd.first = nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        load_into(odd, folder)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="convert"):
        export(Net(), tmp_path / "plain")
    patches = convert(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)), "hif8-qat", verbose=False)
    with pytest.raises(ValueError, match="Conv2d"):
        export(patches, tmp_path / "patches")
    with pytest.raises(ValueError, match="float16"):
        export(trained("hif8-qat"), tmp_path / "half", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_copied_folder_loads(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert check(copied) == check(folder)


def test_codes_and_scales_keep_their_dtypes_when_a_model_is_cast(folder: Path) -> None:
    layer = load_into(Net(), folder).to(torch.float32).to(torch.bfloat16).first
    assert (layer.weight_codes.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float32)
    assert layer.input_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16


def test_pack_counts_every_byte_that_is_written(tmp_path: Path) -> None:
    model = trained("e4m3-block128")
    _, tensors, _ = pack(model)
    export(model, tmp_path / "model")
    header_limit = 4096  # bytes; names and shapes
    written = (tmp_path / "model" / WEIGHTS).stat().st_size
    assert 0 < written - sum(tensor.nbytes for tensor in tensors.values()) < header_limit


def test_a_layer_that_fell_back_is_written_as_it_computes(tmp_path: Path) -> None:
    model = trained("hif8-qat")
    hold_high(model.first)
    report = export(model, tmp_path / "model", dtype=torch.float32)
    assert "fallen back" in report.kept["first"] and set(report.manifest.layers) == {"second"}
    loaded = load_into(Net(), tmp_path / "model")
    assert type(loaded.first) is nn.Linear and torch.equal(loaded(TOKENS), model(TOKENS))

    hold_high(model)
    with pytest.raises(ValueError, match="every 8-bit layer has fallen back"):
        export(model, tmp_path / "none")


def test_a_warm_up_that_has_not_ended_is_said(tmp_path: Path) -> None:
    assert export(trained("hif8-qat"), tmp_path / "warm").notes == ()
    (note,) = export(trained(get_recipe("hif8-qat").replace(warmup_steps=9)), tmp_path / "cold").notes
    assert "2 of 9 steps" in note


def test_a_linked_folder_and_the_current_one_are_written_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("hif8-qat")
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to(real)  # which is not there yet
    for _ in range(2):
        export(model, link)
        assert link.is_symlink() and (real / MANIFEST).is_file()
        assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(model, ".")
    assert (tmp_path / "here" / MANIFEST).is_file() and len(list(tmp_path.iterdir())) == 3
