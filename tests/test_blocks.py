"""Recipes that leave the first and last blocks of a model alone, and the recipe of the MLPs in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8kernels
from fp8kernels import Alarm, Recipe, Role, convert, get_recipe, plan, revert
from fp8kernels.convert import decide
from fp8kernels.export import export, load_into
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.nn.linear import Linear
from fp8kernels.nn.step import layers

EDGES = get_recipe("hif8-qat").replace(high_precision_blocks=(2, 1))
MLP = get_recipe("hif8-qat-mlp")


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.act(self.up(self.norm(x))))
        return x + sum((expert(x) for expert in self.experts), torch.zeros_like(x))


class Model(nn.Module):
    def __init__(self, blocks: int = 5, experts: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.layers = nn.ModuleList(Block(experts) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.layers:
            x = block(x)
        return self.heads[0](x) + self.heads[1](x)


def converted(model: nn.Module, recipe: Recipe = EDGES) -> set[str]:
    return {d.name for d in decide(model, recipe) if d.recipe is not None}


def reasons(model: nn.Module, recipe: Recipe = EDGES) -> dict[str, str | None]:
    return {d.name: d.reason for d in decide(model, recipe)}


def test_the_first_and_the_last_stay() -> None:
    found = reasons(Model())
    assert {name for name, reason in found.items() if reason is None} == {
        "first", "heads.0", "heads.1", "layers.2.up", "layers.2.down", "layers.3.up", "layers.3.down"
    }  # fmt: skip
    assert found["layers.0.up"] == found["layers.1.down"] == "one of the first 2 blocks"
    assert found["layers.4.up"] == "the last block"


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (0, 3), (2, 2)])
def test_any_number_at_either_end(first: int, last: int) -> None:
    names = converted(Model(), EDGES.replace(high_precision_blocks=(first, last)))
    assert {int(name.split(".")[1]) for name in names if name.startswith("layers")} == set(range(first, 5 - last))


def test_ten_blocks_and_more() -> None:
    """Block 1 is not block 10."""
    names = converted(Model(12), EDGES.replace(high_precision_blocks=(2, 1)))
    assert {int(name.split(".")[1]) for name in names if name.startswith("layers")} == set(range(2, 11))


def test_a_longer_list_inside_a_block_is_not_meant() -> None:
    names = converted(Model(4, experts=9))
    assert {name for name in names if "experts" in name} == {f"layers.2.experts.{n}" for n in range(9)}


def test_a_list_of_layers_and_a_sequence_of_blocks() -> None:
    assert converted(nn.ModuleList(nn.Linear(8, 8) for _ in range(5))) == {"2", "3"}
    assert converted(nn.Sequential(*(Block() for _ in range(4)))) == {"2.up", "2.down"}


def test_lists_of_several_classes_are_no_blocks() -> None:
    model = Model(4)
    model.layers.append(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"'heads' of Model has 2 blocks"):
        decide(model, EDGES)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Linear(8, 8), r"high_precision_blocks=\(2, 1\): Linear has no blocks"),
        (lambda: Model().layers[0], "Block has no blocks"),
        (lambda: Model(3), "'layers' of Model has 3 blocks, so that no block would be 8-bit"),
        (lambda: nn.ModuleDict({"a": Model(4).layers, "b": Model(4).layers}), "several lists of 4 blocks, 'a', 'b'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(model, says: str) -> None:  # type: ignore[no-untyped-def]
    net = model()
    with pytest.raises(ValueError, match=says):
        convert(net, EDGES, verbose=False)
    assert not layers(net)


@pytest.mark.parametrize("blocks", [(-1, 0), (1,), (1, 2, 3), (0.5, 0)])
def test_bad_numbers_are_refused(blocks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="two numbers of blocks"):
        EDGES.replace(high_precision_blocks=blocks)


def test_numbers_from_a_file_are_a_list() -> None:
    recipe = get_recipe("hif8-qat").replace(high_precision_blocks=[2, 1])
    assert recipe == EDGES
    assert hash(recipe) == hash(EDGES)


def test_overrides_say_nothing_of_these_blocks() -> None:
    recipe = EDGES.with_override("*.up", get_recipe("e4m3-row")).with_override("layers.3.*", None)
    found = reasons(Model(), recipe)
    assert found["layers.0.up"] == "one of the first 2 blocks"
    assert found["layers.3.up"] == "the recipe leaves 'layers.3.*' as it is"
    assert found["layers.2.up"] is None


def test_layers_have_the_recipe_without_what_chooses_them() -> None:
    model = convert(Model(), EDGES, verbose=False)
    assert {layer.fp8_recipe for layer in layers(model)} == {get_recipe("hif8-qat").replace(overrides=())}
    assert Linear(4, 4, recipe=MLP).fp8_recipe == MLP.replace(overrides=(), high_precision_blocks=(0, 0))


def test_the_table_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    convert(Model(), EDGES)
    said = capsys.readouterr().out
    for part in ("hif8-qat: 7 of 13", "stays: one of the first 2 blocks", "stays: the last block"):
        assert part in said, said


def test_converted_and_fused_blocks_are_blocks_still(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks whose class has changed on the way: MLPs that hand codes on, and layers that are 8-bit."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            x = self.act(x)
            return self.fc2(x)

    for model in (nn.ModuleList(Mlp() for _ in range(4)), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))):
        convert(model, EDGES, verbose=False)
        before = [type(module) for module in model.modules()]
        assert len({type(block) for block in model}) == 2
        convert(model, EDGES)
        assert "already converted" in capsys.readouterr().out
        assert [type(module) for module in model.modules()] == before
        assert len(layers(revert(model))) == 0


def test_plan_measures_what_is_left() -> None:
    found = plan(Model(), [torch.randn(4, 8)], EDGES, budget=0.2, verbose=False)
    assert {row.layer for row in found.rows} == converted(Model())
    assert found.recipe.high_precision_blocks == (2, 1)
    left = {name for name, reason in reasons(Model(), found.recipe).items() if reason is None}
    assert left == converted(Model()) - set(found.left)
    assert found.left


def test_plan_keeps_overrides_that_name_the_recipe_itself() -> None:
    recipe = EDGES.replace(warmup_steps=7, overrides=(("*.up", ...), ("*", None)))
    found = plan(Model(), [torch.randn(4, 8)], recipe, budget=0.0, verbose=False)
    assert [row.layer for row in sorted(found.rows, key=lambda row: row.layer)] == ["layers.2.up", "layers.3.up"]
    assert found.recipe == recipe


def test_export_and_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = convert(Model(), EDGES, verbose=False), torch.randn(4, 8)
    model(x)
    fp8kernels.commit(model)
    wanted = model.eval()(x)
    report = export(model, tmp_path / "model", dtype=torch.float32)
    assert report.manifest is not None
    assert set(report.manifest.layers) == converted(Model())
    assert torch.equal(load_into(Model(), tmp_path / "model")(x), wanted)


@pytest.mark.parametrize("recipe", [EDGES, MLP])
def test_a_recipe_is_what_it_prints(recipe: Recipe) -> None:
    names = {"Recipe": Recipe, "Role": Role, "Alarm": Alarm, "Ellipsis": ...}
    assert eval(repr(recipe), names) == recipe


# the MLPs in the middle


def language_model(blocks: int = 8, **config: object) -> nn.Module:
    return llama(LlamaSize(vocab=64, hidden=32, intermediate=48, layers=blocks, heads=2, context=16), **config)


def test_the_recipe_as_published() -> None:
    """63 linear layers of openPangu-Embedded-1B's 26 blocks, of which 3 to 23 are 8-bit."""
    names = converted(language_model(26, attention_bias=True, tie_word_embeddings=True), MLP)
    middle = range(3, 24)
    assert names == {f"model.layers.{n}.mlp.{part}_proj" for n in middle for part in ("gate", "up", "down")}
    assert len(names) == 63
    assert [MLP.target(index) for index in range(3)] == [15.0, 15.0, 15.0]
    assert {role.fmt for role in MLP.roles() if role is not None} == {"hif8"}
    assert (MLP.algorithm, MLP.window, MLP.warmup_steps, MLP.interval) == ("max", 64, 500, 1)
    assert not any(role.clamp for role in MLP.roles() if role is not None)


def test_changes_of_the_recipe_reach_its_layers() -> None:
    model = convert(language_model(), MLP.replace(window=7, warmup_steps=1), verbose=False)
    assert len(layers(model)) == 3 * 3
    assert {layer.fp8_history.shape[1] for layer in layers(model)} == {7}
    assert all(layer.fp8_recipe.warmup_steps == 1 and not layer.fp8_warm for layer in layers(model))


@pytest.mark.parametrize("name", [
    "model.layers.5.mlp.gate_proj", "model.layers.5.mlp.experts.3.up_proj", "model.layers.5.feed_forward.w2",
    "model.layers.5.block_sparse_moe.experts.0.w1", "model.decoder.layers.5.fc1", "transformer.h.5.mlp.c_fc",
    "transformer.h.5.mlp.c_proj", "encoder.block.5.layer.1.DenseReluDense.wo", "decoder.block.5.layer.2.wi_0",
    "transformer.blocks.5.ffn.down_proj", "layers.5.linear2", "bert.encoder.layer.5.intermediate.dense",
    "bert.encoder.layer.5.output.dense", "gpt_neox.layers.5.mlp.dense_4h_to_h", "model.layers.5.mlp.Wi",
])  # fmt: skip
def test_mlps_by_the_names_that_they_have(name: str) -> None:
    recipe, pattern = MLP.for_layer(name)
    assert recipe == MLP.replace(overrides=(), high_precision_blocks=(0, 0)), pattern


@pytest.mark.parametrize("name", [
    "lm_head", "model.layers.5.self_attn.q_proj", "model.layers.5.self_attn.o_proj", "model.layers.5.attention.wo",
    "transformer.h.5.attn.c_proj", "model.layers.5.mlp.gate", "model.layers.5.block_sparse_moe.gate",
    "model.layers.5.mlp.shared_expert_gate", "bert.encoder.layer.5.attention.output.dense", "score",
    "model.layers.5.mlp.router.classifier", "encoder.block.5.layer.0.SelfAttention.o",
])  # fmt: skip
def test_what_is_no_mlp_stays(name: str) -> None:
    assert MLP.for_layer(name)[0] is None


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("recipe", ["hif8-qat", "hif8-qat-mlp"])
def test_a_model_with_biases_and_tied_embeddings_trains(recipe: str) -> None:
    """As openPangu-Embedded's: q, k, v and o have biases, and the head is the embedding, which stays as it is."""
    torch.manual_seed(0)
    model = language_model(6, attention_bias=True, tie_word_embeddings=True)
    attention = model.model.layers[3].self_attn.o_proj
    before, twin = attention.bias.detach().clone(), copy.deepcopy(model)
    convert(model, get_recipe(recipe).replace(warmup_steps=2), verbose=False)
    losses, expected = train(model, 5), train(twin, 5)
    assert losses[:2] == expected[:2]
    assert losses[2] != expected[2]
    assert losses[-1] < losses[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    assert not torch.equal(attention.bias, before)
    assert isinstance(attention, Linear) == (recipe == "hif8-qat")
    for layer in layers(model):
        assert int(layer.fp8_step) == 5
        assert layer.fp8_on
        rows = slice(0, 3 if recipe == "hif8-qat-mlp" else 2)
        assert (layer.fp8_scale[rows] > 0).all()
        assert (layer.fp8_counters[rows, 1] == 0).all(), "HiF8's head-room takes what a step adds"
    plain = language_model(6, attention_bias=True, tie_word_embeddings=True)
    plain.load_state_dict(fp8kernels.without_state(model.state_dict()))
