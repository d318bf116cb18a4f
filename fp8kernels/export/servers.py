"""What transformers, vLLM and SGLang each do with the layers of a checkpoint, by the rules of their loaders.

The rules were read in transformers 5.23.0, compressed-tensors 0.20.0, vLLM 0.33.0 and SGLang 0.5.23; beside each stands
the function that holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from .config import QUANT_METHOD, entries
from .requantize import LEAST_SCALE
from .stored import COMPRESSED, FP8, MODELOPT, Scheme, Stored, StoredLayer, read_stored, with_entries
from .values import Values, read_values

FORMATS = ("float-quantized", "naive-quantized")  # vllm is_activation_quantization_format, of those with 8-bit floats
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "fc2", "w2")  # split along their inputs
PLUG_INS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}  # groups of entry points
OLD_GPU = "below compute capability 8.9"
STEP = 5  # dB; finer numbers would make a row of each layer
RANKS = (8, 4, 2)  # tensor-parallel ranks that are looked at


@dataclass(frozen=True)
class ServerRow:
    """One linear layer: what the files hold, and what each server computes with it."""

    layer: str
    weights: str
    inputs: str
    transformers: str
    vllm: str
    sglang: str


def explain_servers(folder: str | Path) -> list[ServerRow]:
    """For each linear layer of a checkpoint, what each of three servers does with it; in the order of the files.

    raises   FileNotFoundError if it is no folder, or files are missing; ValueError for a file that is not what its
             header says. What is merely wrong with a layer stands in its row, and in `check_report(folder).problems`
    """
    stored = read_stored(folder)
    if stored.method == QUANT_METHOD and stored.settings:
        with_entries(stored, entries(stored.settings))
    return rows_of(stored, read_values(stored))


def rows_of(stored: Stored, values: Values) -> list[ServerRow]:
    """`explain_servers` of what has been read already."""
    place = {layer.name: group for group in stored.groups() for layer in group}
    return [_row(stored, values, layer, place.get(layer.name, [layer])) for layer in stored.layers]


def plug_in(server: str) -> str:
    """Whether the plug-in for a server is installed here, in words."""
    found = entry_points(group=PLUG_INS[server])
    return "installed here" if any(point.value.startswith("fp8kernels") for point in found) else "not installed here"


def _row(stored: Stored, values: Values, layer: StoredLayer, group: list[StoredLayer]) -> ServerRow:
    scheme = layer.scheme
    if not layer.eight_bit:
        plain = f"as it is, in {layer.dtype}"
        if scheme is None:
            return ServerRow(layer.name, layer.dtype, "as they are", plain, plain, plain)
        refused = f"refused: config.json promises 8 bits, the file holds {layer.dtype}; add it to the ignore list"
        return ServerRow(layer.name, layer.dtype, "as they are", refused, refused, refused)
    if stored.method == QUANT_METHOD:
        return _native(stored, layer, group)
    weights = f"{layer.dtype}, " + (
        "config.json ignores it" if layer.ignored else _weights(scheme) if scheme else "no scheme"
    )
    if scheme is None or layer.scale is None:
        why = (
            "config.json ignores it"
            if layer.ignored
            else "config.json gives it no scheme"
            if scheme is None
            else "its scale is missing"
        )
        refused = f"wrong: {why}, and codes would be taken for weights"
        return ServerRow(layer.name, weights, "?", refused, refused, refused)
    inputs = _inputs(scheme)
    return ServerRow(
        layer.name,
        weights,
        inputs,
        _transformers(stored, values, layer, scheme),
        _vllm(stored, values, scheme, group),
        _sglang(stored, values, scheme, group),
    )


def _weights(scheme: Scheme) -> str:
    return "one scale" if scheme.weights == "tensor" else f"a scale for each {scheme.weights}"


def _inputs(scheme: Scheme) -> str:
    if scheme.inputs in ("static", "none"):
        return "one static scale" if scheme.inputs == "static" else "as they are"
    return f"a scale for each {scheme.inputs}, found anew"


def _native(stored: Stored, layer: StoredLayer, group: list[StoredLayer]) -> ServerRow:
    """integrations/hugging_face.py, integrations/vllm, integrations/sglang: codes stay what they are."""
    scheme = layer.scheme
    weights = f"{scheme.fmt}, {_weights(scheme)}" if scheme else "codes"
    inputs = _inputs(scheme) if scheme else "?"
    if not stored.config:
        none = "not loaded: no config.json; fp8kernels.serving.load(FOLDER, model=…) reads it"
        return ServerRow(layer.name, weights, inputs, none, none, none)
    transformers = (
        "8-bit, with `import fp8kernels.integrations.hugging_face` before from_pretrained; without it the weights are "
        "made up"
    )
    if any(other.scheme != scheme or not other.eight_bit for other in group):  # served_linear.layer_entry
        refused = "refused: shards that are computed as one are not read alike"
        return ServerRow(layer.name, weights, inputs, transformers, refused, refused)
    return ServerRow(
        layer.name,
        weights,
        inputs,
        transformers,
        f"8-bit, with the plug-in fp8kernels ({plug_in('vllm')}); without it refused: unknown quantization method",
        f"8-bit, with the plug-in fp8kernels ({plug_in('sglang')}); without it refused: unknown quantization method",
    )


def _transformers(stored: Stored, values: Values, layer: StoredLayer, scheme: Scheme) -> str:
    if stored.method == COMPRESSED:  # CompressedTensorsHfQuantizer, compressed_tensors set_forward_quantized
        shape = stored.tensors[layer.scale or ""].shape
        if shape == ():
            return "refused: weight_scale has no dimension, (1,) is wanted"
        said = "decompressed to the model's dtype at the first forward"
        said += ", inputs rounded to 8 bits and back" if scheme.inputs != "none" else ""
        if layer.scale in values.inexact:
            said += f", scale cast to bf16 ({values.inexact[layer.scale]:.2%} off)"
        return said
    if stored.method == FP8:  # FineGrainedFP8HfQuantizer: serialized_names
        if not (layer.scale or "").endswith("weight_scale_inv"):
            return "wrong: reads weight_scale_inv alone, so codes stand as weights without their scale"
        block = scheme.block()  # Fp8Dequantize._dequantize_one divides the weight by the grid of its scales
        ragged = block is not None and any(side % size for side, size in zip(layer.shape, block, strict=True))
        cpu = (
            "wrong without such a GPU: its blocks do not divide the weight"
            if ragged
            else "without such a GPU dequantized to bf16"
        )
        return f"8-bit on compute capability 8.9 and above, {cpu}"
    return f"wrong: no quantizer for {stored.method!r}, so codes are not loaded and weights are made up"


def _vllm(stored: Stored, values: Values, scheme: Scheme, group: list[StoredLayer]) -> str:
    """CompressedTensorsConfig._get_scheme_from_parts, Fp8LinearMethod, ModelOptFp8Config."""
    if _misplaced(stored, scheme, group):
        return "wrong: its blocks do not divide what is computed as one, and scales land beside their rows"
    if (refused := _refused(stored, scheme, group)) is not None:
        return refused
    if scheme.inputs == "none":
        return "weight-only: products in the model's dtype"
    old = f"{OLD_GPU} weight-only"  # CompressedTensorsW8A16Fp8, Marlin
    return "; ".join(
        [
            _product(scheme, "W8A8"),
            *_shards(values, scheme, group),
            *_small(values, scheme, group),
            *_split(scheme, group),
            old,
        ]
    )


def _sglang(stored: Stored, values: Values, scheme: Scheme, group: list[StoredLayer]) -> str:
    """As vLLM's, of which its loaders are copies; compressed_tensors_w8a16_fp8.py has no blocks."""
    if (refused := _refused(stored, scheme, group)) is not None:
        return refused
    architectures = stored.config.get("architectures")
    if stored.method == FP8 and scheme.block() and architectures in (["LlamaForCausalLM"], ["MistralForCausalLM"]):
        # its models/llama.py load_weights looks for every weight_scale_inv as weight_scale, which no layer has
        return "wrong: its Llama renames weight_scale_inv, so scales are never set; take compressed-tensors"
    blocks = scheme.block() is not None and stored.method == COMPRESSED
    if scheme.inputs == "none":
        return (
            "refused: weight-only layers have no blocks there"
            if blocks
            else "weight-only: products in the model's dtype"
        )
    old = f"{OLD_GPU} refused: no blocks there" if blocks else f"{OLD_GPU} weight-only"
    return "; ".join(
        [
            _product(scheme, "W8A8"),
            *_shards(values, scheme, group),
            *_small(values, scheme, group),
            *_split(scheme, group),
            old,
        ]
    )


def _refused(stored: Stored, scheme: Scheme, group: list[StoredLayer]) -> str | None:
    """What both servers refuse while they load, or None."""
    if stored.method not in (COMPRESSED, FP8, MODELOPT):
        return f"refused: unknown quantization method {stored.method!r}"
    if any(layer.dtype != "F8_E4M3" for layer in group if layer.eight_bit):
        return "refused: weights are read as E4M3 alone"
    if any(layer.scheme != scheme or not layer.eight_bit for layer in group):  # should_ignore_layer, is_layer_skipped
        return "refused: shards that are computed as one are in different precisions"
    if stored.method == COMPRESSED:
        if stored.settings.get("format") not in FORMATS:
            return f"refused: format {str(stored.settings.get('format'))[:40]!r} rounds no inputs, so no scheme fits"
        known = scheme.weights in ("tensor", "channel") or scheme.block() is not None  # _is_fp8_w8a8
        if not known or scheme.inputs.startswith("static "):
            return f"refused: no scheme for weights by {scheme.weights} and inputs by {scheme.inputs}"
        if scheme.block() is not None and scheme.inputs == "static":
            return "refused: blocks go with dynamic inputs"
    if stored.method == FP8 and scheme.block() is not None:
        if stored.settings.get("activation_scheme") != "dynamic":
            return "refused: blocks go with activation_scheme dynamic"
        if any(not (layer.scale or "").endswith("weight_scale_inv") for layer in group):
            return "refused: scales of blocks are to be named weight_scale_inv"
    block = scheme.block()
    if block is not None:  # validate_fp8_block_shape: all shards but the last
        for layer in group[:-1]:
            if layer.shape[0] % block[0]:
                return (
                    f"refused: {layer.shape[0]} rows of {layer.name.rpartition('.')[2]} are no multiple of {block[0]}"
                )
    return None


def _product(scheme: Scheme, kind: str) -> str:
    inputs = {"static": "static inputs", "token": "dynamic inputs by token", "tensor": "dynamic inputs"}
    return f"{kind}, {inputs.get(scheme.inputs, f'dynamic inputs by {scheme.inputs}')}"


def _shards(values: Values, scheme: Scheme, group: list[StoredLayer]) -> list[str]:
    """requantize_with_max_scale, and input_scale.max() of what is computed as one."""
    if len(group) < 2:
        return []
    said = []
    if scheme.weights == "tensor":
        if (loss := values.requantized.get(group[0].name)) is not None:
            at_least = f"{loss // STEP * STEP:.0f} dB or more" if loss < math.inf else "nothing lost"
            said.append(f"{len(group)} shards rounded again with the largest weight_scale ({at_least})")
        elif all(layer.name in values.scales for layer in group):
            said.append(f"{len(group)} shards as one, scales equal: nothing lost")
    if scheme.inputs == "static" and len({values.inputs.get(layer.name) for layer in group}) > 1:
        said.append("inputs with the largest input_scale")
    return said


def _small(values: Values, scheme: Scheme, group: list[StoredLayer]) -> list[str]:
    """per_tensor_dequantize goes through float16, also where the layer stands alone or all scales are equal."""
    if scheme.weights != "tensor" or all(values.scales.get(layer.name, 1.0) >= LEAST_SCALE for layer in group):
        return []
    return ["some of the smallest codes change: weight_scale is below 2**-15"]


def _misplaced(stored: Stored, scheme: Scheme, group: list[StoredLayer]) -> bool:
    """allow_fp8_block_shape_mismatch, adjust_block_scale_shard: shards that are no whole blocks, but have room."""
    block = scheme.block()
    if stored.method != FP8 or block is None or all(layer.shape[0] % block[0] == 0 for layer in group[:-1]):
        return False
    starts = [sum(layer.shape[0] for layer in group[:number]) for number in range(len(group))]
    ends = [-(-start // block[0]) - (-layer.shape[0] // block[0]) for start, layer in zip(starts, group, strict=True)]
    return max(ends) <= -(-(starts[-1] + group[-1].shape[0]) // block[0])


def _split(scheme: Scheme, group: list[StoredLayer]) -> list[str]:
    """validate_fp8_block_shape: what a rank holds is whole blocks."""
    block = scheme.block()
    if block is None:
        return []
    along = 1 if group[0].name.rpartition(".")[2] in ROW_PARALLEL else 0

    def fits(ranks: int) -> bool:
        return all(layer.shape[along] % (ranks * block[along]) == 0 for layer in group)

    most = next((ranks for ranks in RANKS if fits(ranks)), 1)
    return [f"tensor parallel up to {most}" if most > 1 else "not tensor parallel: blocks would be cut"]
