"""What check says of transformers is what transformers does; of vLLM and SGLang, what their loaders' rules are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from serving.folders import LAYOUTS, edit_config, read, save, settings, write_folder

from fp8kernels.export import ServerRow, check_report, explain_servers
from fp8kernels.export.patterns import matches
from fp8kernels.formats import E4M3
from fp8kernels.models.llama import LlamaSize

Q, K, UP, DOWN, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "lm_head",
)


def rows(folder: Path) -> dict[str, ServerRow]:
    return {row.layer: row for row in explain_servers(folder)}


SAID = {
    "static": ("decompressed to the model's dtype", "W8A8, static inputs; 3 shards as one", "W8A8, static inputs; 3"),
    "dynamic": ("decompressed to the model's dtype", "W8A8, dynamic inputs by token", "W8A8, dynamic inputs by token"),
    "block": (
        "decompressed to the model's dtype",
        "W8A8, dynamic inputs by group 128",
        "W8A8, dynamic inputs by group",
    ),
    "fp8": ("wrong: reads weight_scale_inv alone", "W8A8, static inputs; 3 shards as one", "W8A8, static inputs; 3"),
    "fp8-block": ("8-bit on compute capability 8.9", "W8A8, dynamic inputs by group 128", "wrong: its Llama renames"),
    "modelopt": (
        "wrong: no quantizer for 'modelopt'",
        "W8A8, static inputs; 3 shards as one",
        "W8A8, static inputs; 3",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_has_a_row(tmp_path: Path, layout: str) -> None:
    write_folder(tmp_path, layout)
    found = rows(tmp_path)
    assert len(found) == 15
    for cell, said in zip(("transformers", "vllm", "sglang"), SAID[layout], strict=True):
        assert getattr(found[Q], cell).startswith(said), getattr(found[Q], cell)
        assert getattr(found[HEAD], cell) == "as it is, in BF16"


@pytest.fixture
def load() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    return lambda at, **options: transformers.AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.bfloat16, local_files_only=True, **options
    )


def decoded(tensors: dict[str, torch.Tensor], layer: str, key: str = "weight_scale") -> torch.Tensor:
    codes, scale = tensors[f"{layer}.weight"].float(), tensors[f"{layer}.{key}"]
    if scale.ndim == 2 and scale.shape[0] != codes.shape[0]:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes * scale


@pytest.mark.parametrize("layout", ["static", "dynamic", "block"])
def test_transformers_decompresses_and_rounds_inputs(load: Any, tmp_path: Path, layout: str) -> None:
    write_folder(tmp_path, layout)
    assert rows(tmp_path)[Q].transformers == (
        "decompressed to the model's dtype at the first forward, inputs rounded to 8 bits and back"
    )
    model, tensors = load(tmp_path), read(tmp_path)
    seen: dict[str, torch.Tensor] = {}
    layer = model.get_submodule(DOWN)
    layer.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        model(torch.arange(8).reshape(1, 8))
    assert layer.weight.dtype == torch.bfloat16
    weight = decoded(tensors, DOWN)
    assert torch.equal(layer.weight, weight.to(torch.bfloat16))
    x = seen["x"].float()
    if layout == "static":
        scale = tensors[f"{DOWN}.input_scale"]
        x = E4M3.decode(E4M3.encode(x / scale)) * scale
        rounded = (x.to(torch.bfloat16) @ layer.weight.T).float()
        torch.testing.assert_close(seen["out"].float(), rounded, rtol=2**-7, atol=2**-7 * float(rounded.abs().max()))
    plain = (seen["x"] @ layer.weight.T).float()
    assert not torch.equal(seen["out"].float(), plain), "inputs were rounded"


def test_transformers_takes_fp8_codes_for_weights_where_scales_have_another_name(load: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, "fp8")
    assert rows(tmp_path)[Q].transformers.startswith("wrong")
    tensors = read(tmp_path)
    weight = load(tmp_path).get_submodule(Q).weight.float()
    assert torch.equal(weight, tensors[f"{Q}.weight"].float())
    assert not torch.equal(weight, decoded(tensors, Q))


def test_transformers_decodes_fp8_blocks_without_a_gpu(load: Any, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    write_folder(tmp_path, "fp8-block")
    assert "without such a GPU dequantized to bf16" in rows(tmp_path)[Q].transformers
    model = load(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))  # as it is without a GPU anyway
    weight = model.get_submodule(UP).weight
    assert torch.equal(weight, decoded(read(tmp_path), UP, "weight_scale_inv").to(torch.bfloat16))


def test_transformers_makes_up_the_weights_of_modelopt(load: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, "modelopt")
    assert rows(tmp_path)[Q].transformers.startswith("wrong: no quantizer")
    weight = load(tmp_path).get_submodule(Q).weight.float()
    assert not torch.allclose(weight, decoded(read(tmp_path), Q), atol=1e-3)


PATTERNS = (
    "lm_head",
    "re:.*q_proj",
    "re:model\\.layers\\.0\\..*",
    "q_proj",
    "re:q_proj",
    "re:.*mlp.(gate|up)_proj$",
    "layers",
)


def test_patterns_mean_what_compressed_tensors_means() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils import match

    for pattern in PATTERNS:
        for name in (Q, K, UP, DOWN, HEAD, "model.layers.01.mlp.up_proj"):
            assert matches(pattern, name) == match.match_name(name, pattern), (pattern, name)


def test_shards_with_different_scales_are_rounded_again(tmp_path: Path) -> None:
    write_folder(tmp_path, "static", share=False)
    found = rows(tmp_path)
    assert re.search(r"3 shards rounded again with the largest weight_scale \(\d+ dB or more\)", found[Q].vllm)
    assert "shards" not in found[DOWN].vllm
    tensors = read(tmp_path)
    tensors[f"{Q}.input_scale"] = torch.tensor([0.5])
    save(tmp_path, tensors)
    assert "inputs with the largest input_scale" in rows(tmp_path)[K].sglang


def test_shards_in_different_precisions_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    edit_config(tmp_path, settings("static") | {"ignore": ["lm_head", "re:.*0.self_attn.k_proj"]})
    tensors = {name: tensor for name, tensor in read(tmp_path).items() if not name.startswith(f"{K}.")}
    save(tmp_path, tensors | {f"{K}.weight": torch.ones(128, 128, dtype=torch.bfloat16)})
    assert rows(tmp_path)[Q].vllm == "refused: shards that are computed as one are in different precisions"


def test_blocks_say_how_many_ranks_may_share_them(tmp_path: Path) -> None:
    write_folder(
        tmp_path, "block", size=LlamaSize(vocab=64, hidden=512, intermediate=1024, layers=1, heads=4, context=32)
    )
    found = rows(tmp_path)
    assert "tensor parallel up to 4" in found[Q].vllm
    assert "tensor parallel up to 8" in found[UP].sglang
    assert "tensor parallel up to 8" in found[DOWN].vllm
    assert "below compute capability 8.9 refused: no blocks there" in found[DOWN].sglang


def test_formats_and_schemes_that_nobody_knows(tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    edit_config(tmp_path, settings("static") | {"format": "pack-quantized"})
    assert rows(tmp_path)[Q].vllm.startswith("refused: format 'pack-quantized'")
    odd = settings("static")
    group = odd["config_groups"]["group_0"]
    odd["config_groups"] = {"group_0": group | {"weights": group["weights"] | {"strategy": "tensor_group"}}}
    edit_config(tmp_path, odd)
    assert rows(tmp_path)[Q].vllm.startswith("refused: no scheme for weights by tensor_group")
    edit_config(tmp_path, {"quant_method": "unheard"})
    assert rows(tmp_path)[Q].vllm == "wrong: config.json gives it no scheme, and codes would be taken for weights"


def test_the_table_has_a_line_for_each_kind_of_layer(tmp_path: Path) -> None:
    write_folder(
        tmp_path, "static", size=LlamaSize(vocab=64, hidden=128, intermediate=128, layers=26, heads=1, context=32)
    )
    report = check_report(tmp_path)
    assert len(report.rows) == 26 * 7 + 1
    assert report.table().row_count == 4
    assert report.table(layers=True).row_count == len(report.rows)
    console = Console(width=200, record=True)
    console.print(report.table())
    text = console.export_text()
    assert "model.layers.*.self_attn.{" in text
    assert "(78 layers)" in text


def test_a_native_folder_names_the_plug_ins(native_folder: Path) -> None:
    row = rows(native_folder)[Q]
    assert row.weights == "hif8, one scale"
    assert row.inputs == "one static scale"
    assert "import fp8kernels.integrations.hugging_face" in row.transformers
    assert "plug-in fp8kernels" in row.vllm
    assert "plug-in fp8kernels" in row.sglang
