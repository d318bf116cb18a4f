"""Checkpoints of others, written by hand: the shapes and names that llm-compressor, vLLM and ModelOpt write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fp8kernels.formats import E4M3
from fp8kernels.models.llama import LlamaSize, llama

SIZE = LlamaSize(vocab=300, hidden=128, intermediate=256, layers=2, heads=2, context=64)
SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True}
GROUPS = {
    "static": (WEIGHTS | {"strategy": "tensor"}, INPUTS | {"strategy": "tensor", "dynamic": False}),
    "dynamic": (WEIGHTS | {"strategy": "channel"}, INPUTS | {"strategy": "token", "dynamic": True}),
    "block": (
        WEIGHTS | {"strategy": "block", "block_structure": [128, 128]},
        INPUTS | {"strategy": "group", "group_size": 128, "dynamic": True},
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
}
LAYOUTS = (*GROUPS, *SETTINGS)


def settings(layout: str) -> dict[str, Any]:
    """`quantization_config` of a layout."""
    if layout in SETTINGS:
        return dict(SETTINGS[layout])
    weights, inputs = GROUPS[layout]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def write_folder(folder: Path, layout: str, *, share: bool = True, size: LlamaSize = SIZE) -> nn.Module:
    """A tiny Llama with random weights in one of LAYOUTS; returns the plain model."""
    torch.manual_seed(0)
    model = llama(size).to(torch.bfloat16)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in linears
    }
    for name, layer in linears.items():
        tensors.update(
            {f"{name}.{key}": value for key, value in _layer(layout, name, layer, linears, share=share).items()}
        )
    model.config.save_pretrained(folder)
    save(folder, tensors)
    edit_config(folder, settings(layout), architectures=["LlamaForCausalLM"])
    return model


def _layer(layout: str, name: str, layer: nn.Linear, linears: dict[str, Any], *, share: bool) -> dict[str, Tensor]:
    weight = layer.weight.detach().float()
    parent, _, last = name.rpartition(".")
    group = next((parts for parts in SHARED if share and last in parts), {last})
    amax = max(float(linears[f"{parent}.{part}"].weight.detach().abs().max()) for part in group)
    if "block" in layout:
        rows, columns = weight.shape[0] // 128, weight.shape[1] // 128
        blocks = weight.reshape(rows, 128, columns, 128).abs().amax((1, 3))  # [N / 128, K / 128]
        scale = (blocks / E4M3.max).to(torch.bfloat16).float()
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    elif layout == "dynamic":
        scale = full = (weight.abs().amax(1, keepdim=True) / E4M3.max).to(torch.bfloat16).float()
    else:
        scale = full = torch.tensor([amax / E4M3.max]).to(torch.bfloat16).float()
    codes = E4M3.encode(weight / full).view(torch.float8_e4m3fn)
    key = "weight_scale_inv" if layout == "fp8-block" else "weight_scale"
    inputs = {"input_scale": torch.tensor([2.0**-6])} if layout in ("static", "fp8", "modelopt") else {}
    return {"weight": codes, key: scale.contiguous(), **inputs}


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, to be changed."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, quantization: dict[str, Any] | None = None, **fields: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    if quantization is not None:
        config["quantization_config"] = quantization
    path.write_text(json.dumps(config))
