"""Load exported folders through vLLM's own code and hold what its layers then contain against the files.

    VLLM_TARGET_DEVICE=cpu python tests/serving/peers/vllm_loader.py FOLDER…

with an interpreter that has vLLM 0.33 and fp8kernels. No GPU is needed. vLLM's ModelConfig, quantization config, choice
of scheme, model class, create_weights, weight loaders and process_weights_after_loading run as they are. Three things
stand in for what a machine without a GPU lacks, and are printed:

    torch.accelerator.empty_cache          does nothing
    torch.ops._C.static_scaled_fp8_quant   the CUDA kernel by which vLLM brings the parts of a fused layer to one
                                           scale: round(x * (1 / scale)) to E4M3, saturating
    the CPU's FP8 products                 said to run here, where they need AMX, and packing nothing; none is computed

Per linear layer of vLLM the decoded weight must be the file's, every number, and the input scale the file's. What
`fp8kernels check` says of vLLM beforehand is held against what vLLM then did. With --record in place of folders, what
vLLM does with the cases of ../vllm_cases.py is written to ../recorded, for a test that needs no vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from serving import vllm_cases

from fp8kernels.export.config import QUANT_METHOD, entries
from fp8kernels.formats import E4M3, get_format

PORT = 29571  # of the process group of one
STAND_INS = ("torch.accelerator.empty_cache", "torch.ops._C.static_scaled_fp8_quant", "the CPU's FP8 products")


Held = tuple[Tensor, Tensor, "Tensor | None"]  # codes [N, K], decoded weight [N, K] fp32, input scale


@dataclass(frozen=True)
class Row:
    """What one linear layer of vLLM holds after loading.

    method    vLLM's class, with its scheme where it has one
    changed   codes that are not the file's any more, of `size`
    worst     largest difference of a decoded weight, over the layer's largest
    scale     the input scale is the file's; None where it has none
    """

    name: str
    method: str
    size: int
    changed: int
    worst: float
    scale: bool | None

    @property
    def exact(self) -> bool:
        return self.changed == 0 and self.worst == 0 and self.scale is not False


def stand_in() -> None:
    """What a machine without a GPU lacks; see the module's docstring."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    torch.accelerator.empty_cache = lambda: None
    if not hasattr(torch.ops._C, "static_scaled_fp8_quant"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define("static_scaled_fp8_quant(Tensor! out, Tensor x, Tensor scale, int[]? group_shape=None) -> ()")
        library.impl("static_scaled_fp8_quant", _static_scaled_fp8_quant, "CPU")
        stand_in.library = library  # type: ignore[attr-defined]  # kept, or the op goes with it
    for kernel in vars(cpu).values():
        if isinstance(kernel, type) and "FP8" in kernel.__name__.upper():
            kernel.process_weights_after_loading = lambda self, layer: None
            if "Block" in kernel.__name__ and kernel.__module__ == cpu.__name__:
                kernel.is_supported = classmethod(lambda cls, compute_capability=None: (True, None))


def _static_scaled_fp8_quant(out: Tensor, x: Tensor, scale: Tensor, group_shape: list[int] | None = None) -> None:
    scaled = x.float() * (1.0 / scale.float())
    out.copy_(E4M3.encode(scaled.clamp(-E4M3.max, E4M3.max)).view(torch.float8_e4m3fn))


def load(folder: Path, dtype: str = "bfloat16") -> tuple[nn.Module, Any]:
    """vLLM's model of a folder, and the configuration it was made with."""
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    stand_in()
    model_config = ModelConfig(
        model=str(folder), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=64
    )
    config = VllmConfig(model_config=model_config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{PORT}", 0, backend="gloo")
            initialize_model_parallel(1)
        return get_model(vllm_config=config), config


def compare(model: nn.Module, folder: Path) -> list[Row]:
    """One row for each linear layer of vLLM whose weight the files hold in 8 bits."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    packed = getattr(model, "packed_modules_mapping", {})
    return rows_of(model, folder, (LinearBase, ParallelLMHead), packed)


def rows_of(model: nn.Module, folder: Path, kinds: tuple[type, ...], packed: dict[str, list[str]]) -> list[Row]:
    """One row for each layer of `kinds` whose weight the files hold in 8 bits; SGLang's are compared by it, too."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, kinds):
            continue
        parent, dot, last = name.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in packed.get(last, [last])]
        if f"{name}.weight" in tensors or f"{name}.weight_codes" in tensors:
            parts = [name]
        held = _native(parts, tensors, settings) if settings["quant_method"] == QUANT_METHOD else _fp8(parts, tensors)
        if held is not None:
            rows.append(_row(name, layer, *held))
    return rows


def _native(parts: list[str], tensors: dict[str, Tensor], settings: dict[str, Any]) -> Held | None:
    """Codes [N, K], decoded weight [N, K] fp32 and input scale of the parts in the file, or None: high precision."""
    if f"{parts[0]}.weight_codes" not in tensors:
        return None
    layers = entries(settings)
    codes = torch.cat([tensors[f"{part}.weight_codes"] for part in parts])
    decoded = []
    for part in parts:
        code = tensors[f"{part}.weight_codes"]
        full = _spread(tensors[f"{part}.weight_scale"], code.shape)
        decoded.append(get_format(layers[part].weight_fmt).decode(code) * full)
    return codes, torch.cat(decoded), torch.stack([tensors[f"{part}.input_scale"].reshape(()) for part in parts]).max()


def _fp8(parts: list[str], tensors: dict[str, Tensor]) -> Held | None:
    """The same of folders whose codes are torch's float8_e4m3fn."""
    if tensors.get(f"{parts[0]}.weight", torch.empty(0)).dtype != torch.float8_e4m3fn:
        return None
    codes, decoded, inputs = [], [], []
    for part in parts:
        code = tensors[f"{part}.weight"]
        scale = tensors.get(f"{part}.weight_scale", tensors.get(f"{part}.weight_scale_inv"))
        codes.append(code.view(torch.uint8))
        decoded.append(code.float() * _spread(scale, code.shape))
        if f"{part}.input_scale" in tensors:
            inputs.append(tensors[f"{part}.input_scale"].float().reshape(()))
    return torch.cat(codes), torch.cat(decoded), torch.stack(inputs).max() if inputs else None


def _row(name: str, layer: nn.Module, codes: Tensor, decoded: Tensor, input_scale: Tensor | None) -> Row:
    method = type(layer.quant_method).__name__
    if getattr(layer, "scheme", None) is not None:
        method += f" ({type(layer.scheme).__name__})"
    found = _found(layer, codes.shape)
    if found is None:
        return Row(name, method, codes.numel(), codes.numel(), float("inf"), None)
    have, numbers, scale = found
    return Row(
        name,
        method,
        codes.numel(),
        int((have != codes).sum()),
        float((numbers - decoded).abs().max() / decoded.abs().max()),
        None if input_scale is None else scale is not None and bool(torch.equal(scale, input_scale)),
    )


def _found(layer: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes, decoded weight and input scale that the layer holds; None where it holds no codes of that shape."""
    if hasattr(layer, "fp8kernels_served"):
        served = layer.fp8kernels_served
        codes = torch.cat([run.codes for run in served.runs])[: shape[0]]
        full = [_spread(run.scale, run.codes.shape) for run in served.runs]
        fmt = get_format(served.entry.weight_fmt)
        numbers = torch.cat([fmt.decode(run.codes) * scale for run, scale in zip(served.runs, full, strict=True)])
        return codes, numbers[: shape[0]], torch.stack([run.input_scale.reshape(()) for run in served.runs]).max()
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dtype != torch.float8_e4m3fn:
        return None
    weight = weight.data
    scale = getattr(layer, "weight_scale", getattr(layer, "weight_scale_inv", None))
    if weight.stride(0) == 1 and weight.stride(1) != 1:  # vLLM's products take [K, N], a view of the file's
        weight = weight.t()  # [N, K]
    if tuple(weight.shape) != tuple(shape):
        return None
    weight = weight.contiguous()
    inputs = getattr(layer, "input_scale", None)
    return (
        weight.view(torch.uint8),
        weight.float() * _spread(scale.data.float(), weight.shape),
        None if inputs is None else inputs.detach().float().reshape(()),
    )


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale on any grid over [N, K], or one for each row, as [N, K]."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    if scale.ndim == 1:
        scale = scale[:, None]
    rows, columns = -(-shape[0] // scale.shape[0]), -(-shape[1] // scale.shape[1])
    if scale.shape[0] not in (1, shape[0]):
        rows = 128
    return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def outcome(folder: Path) -> tuple[list[Row], str | None, str]:
    """Rows of a folder, vLLM's refusal or None, and the quantization method that vLLM took."""
    try:
        model, config = load(folder)
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:  # what vLLM refuses, and where it breaks off
        return [], str(error).strip() or type(error).__name__, "refused"
    return compare(model, folder), None, config.model_config.quantization


def record() -> None:
    """Write what vLLM does with the cases of vllm_cases.py."""
    found: dict[str, dict[str, int] | str] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, case in enumerate(vllm_cases.CASES):
            folder = Path(place) / str(number)
            vllm_cases.write(case, folder)
            rows, refusal, _ = outcome(folder)
            found[case.name] = refusal or {row.name: row.changed or (0 if row.exact else -1) for row in rows}
    vllm_cases.OUTCOMES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(vllm_cases.OUTCOMES)


def main(folders: list[str]) -> int:
    """Print the rows of every folder; 1 if a number differs, vLLM refuses, or `fp8kernels check` was wrong about it."""
    import vllm

    print(f"vllm {vllm.__version__}, torch {torch.__version__}; stood in for: {', '.join(STAND_INS)}")
    if folders == ["--record"]:
        record()
        return 0
    wrong = 0
    for folder in map(Path, folders):
        rows, refusal, method = outcome(folder)
        bad = [row for row in rows if not row.exact]
        did = refusal or {row.name: row.changed or (0 if row.exact else -1) for row in rows}
        doubted = vllm_cases.misjudged(folder, did)
        wrong += bool(bad or doubted) or not rows
        print(f"{folder.name}: {method}, {refusal or f'{len(rows)} layers in 8 bits, {len(bad)} differ'}")
        for name in sorted({row.method for row in rows}):
            print(f"  {name}: {sum(row.method == name for row in rows)} layers")
        for row in bad:
            print(f"  {row.name}: {row.changed} of {row.size} codes, {row.worst:.3g} of the largest, scale {row.scale}")
        print("".join(f"  fp8kernels check: {line}\n" for line in doubted), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
