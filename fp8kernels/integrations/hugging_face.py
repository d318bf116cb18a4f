"""transformers' from_pretrained and save_pretrained for models whose linear layers hold 8-bit codes.

    import fp8kernels.integrations.hugging_face                     # registers the method "fp8kernels", once
    model = AutoModelForCausalLM.from_pretrained(folder)            # written by fp8kernels.export
    model = AutoModelForCausalLM.from_pretrained(                   # any checkpoint, rounded while it is read
        folder, quantization_config=Fp8KernelsConfig(weights="hif8"))

`fp8kernels.serving.load` registers it, too. `import fp8kernels` does not, as that would import transformers; without it
transformers warns of an unknown quantization type and makes up the weights of every 8-bit layer.

Layers are replaced while the model has no storage yet, so no weight of theirs is ever in memory in high precision;
codes stay uint8 and scales fp32 whatever dtype is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..export.config import QUANT_METHOD, VERSION, entries, quantization_config
from ..export.inference import check_scales, inference_layer
from ..export.layout import CODES, INPUT_SCALE, SCALE, LayerEntry
from ..formats import get_format
from ..headers import some
from ..models.linears import as_linears
from ..nn.inference import InferenceLinear
from ..ops import quantize
from ..scaling.block import get_block
from ..scaling.qtensor import QTensor

logger = logging.get_logger(__name__)

ON_THE_FLY = "row"  # the block of weights and inputs that are rounded while a plain checkpoint is read
NOT_TRAINABLE = (
    "layers that hold 8-bit codes have no gradients, not even for adapters above or below them: train the model that "
    "was exported, or take model.dequantize(), with fp8kernels.convert(model) (and PEFT, if you like); then export it"
)


class Fp8KernelsConfig(QuantizationConfigMixin):
    """How transformers is to read a checkpoint: from its own groups, or rounded on the fly.

    weights  "hif8", "e4m3" or "e5m2": the format of a plain checkpoint's linear layers, a scale a row
    inputs   the format of their inputs, each row (token) with the scale of its own amax; None: that of the weights
    modules_to_not_convert  names, or patterns as transformers takes them, of layers to leave as they are; the head, and
             whatever shares the embedding's weight, are left in any case
    groups   what config.json of an 8-bit checkpoint says (export/config.py); weights and inputs are not looked at then
    kv_cache the 8-bit cache that the checkpoint asks for, kept for those who read config.json
    raises   ValueError for an unknown format, or groups that no layer can mean
    """

    def __init__(
        self,
        weights: str = "hif8",
        inputs: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        groups: list[dict[str, Any]] | None = None,
        kv_cache: dict[str, str] | None = None,
        version: int = VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers has an enumeration of its own
        self.version = version
        self.weights, self.inputs = get_format(weights).name, get_format(inputs or weights).name
        self.modules_to_not_convert = modules_to_not_convert
        self.groups, self.kv_cache = groups, kv_cache
        if groups is not None:
            self.layers()

    def layers(self) -> dict[str, LayerEntry]:
        """The layers that the groups name, checked.

        raises   ValueError as `export.config.entries`
        """
        return entries(self.to_dict())

    def on_the_fly(self) -> LayerEntry:
        """How a layer that is rounded while it is read computes."""
        return LayerEntry(
            weight_fmt=self.weights,
            weight_block=ON_THE_FLY,
            input_fmt=self.inputs,
            input_block=ON_THE_FLY,
            input_scaling="current",
            input_target=get_format(self.inputs).target,
            power_of_two=False,
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: the groups, once there are any."""
        found: dict[str, Any] = {"quant_method": self.quant_method, "version": self.version}
        if self.groups is not None:
            found["groups"] = self.groups
        else:
            found |= {"weights": self.weights, "inputs": self.inputs}
            found["modules_to_not_convert"] = self.modules_to_not_convert
        if self.kv_cache is not None:
            found["kv_cache"] = self.kv_cache
        return found


class Fp8KernelsQuantizer(HfQuantizer):
    """Puts InferenceLinear in the place of layers before weights are read, and checks after it that all came."""

    requires_calibration = False
    quantization_config: Fp8KernelsConfig

    def __init__(self, quantization_config: Fp8KernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._skip: list[str] = []
        self._made: dict[str, LayerEntry] = {}  # module name -> how it reads its codes

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """raises ValueError for a device map that leaves layers on disk, from where codes are not streamed."""
        if self.pre_quantized and self.quantization_config.groups is None:
            raise ValueError(
                "the checkpoint's quantization_config has no groups, so it does not say how layers read their codes; "
                "export the model again"
            )
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map leaves layers on disk; 8-bit layers are kept in memory: give more memory")

    @property
    def quantized_element_size(self) -> float:
        return 1

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight of a plain checkpoint is to be rounded when it is read."""
        if self.pre_quantized:
            return False
        name, _, key = param_name.rpartition(".")
        return key == "weight" and _is_linear(model.get_submodule(name)) and should_convert_module(name, self._skip)

    def get_quantize_ops(self) -> ConversionOps:
        """What rounds a weight when it is read."""
        return _Round(self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            self._skip = self.get_modules_to_not_convert(
                model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
            )
            return
        self._made = _in_model(model, config.layers())
        for name, entry in self._made.items():
            replace(model, name, entry)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self._made:
            raise ValueError(
                f"{type(model).__name__}: no linear layer was left to round ({some(self._skip)} are left as they are); "
                "give fewer modules_to_not_convert"
            )
        finish(model, self._made)
        as_linears(model)  # what stays in high precision computes as it did in training
        if not self.pre_quantized:
            self.quantization_config.groups = quantization_config(self._made)["groups"]
        return model

    @torch.no_grad()
    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Plain linear layers in `dtype` again, with the numbers that the codes mean; for `model.dequantize()`."""
        for name in self._made:
            layer = model.get_submodule(name)
            codes = QTensor(
                layer.weight_codes,
                layer.weight_scale,
                get_format(layer.weight_role.fmt),
                get_block(layer.weight_role.block),
            )
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(codes.dequantize().to(dtype))
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(dtype))
            model.set_submodule(name, linear.train(layer.training))
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """False; the Trainer asks, and its own message names no way out."""
        logger.warning(NOT_TRAINABLE)
        return False

    @property
    def is_qat_trainable(self) -> bool:
        return False


class _Round(ConversionOps):
    """A weight [N, K] (or [K, N] of GPT-2's class) to codes and scales; its layer is replaced at this moment."""

    def __init__(self, quantizer: Fp8KernelsQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: Any,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        old, entry = model.get_submodule(name), self.quantizer.quantization_config.on_the_fly()
        if isinstance(old, Conv1D):
            weight = weight.t()
        coded = quantize(weight.contiguous(), entry.weight_fmt, block=entry.weight_block)
        new = replace(model, name, entry)
        if old.bias is not None and old.bias.device.type != "meta":  # it was read before the weight
            new.bias = old.bias.detach().to(torch.float32)
            new.bias._is_hf_initialized = True  # type: ignore[union-attr]
        self.quantizer._made[name] = entry
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        found = {CODES: coded.codes, SCALE: coded.scale, INPUT_SCALE: coded.scale.new_zeros(1, 1)}
        return {f"{name}.{key}": tensor for key, tensor in found.items()}


def register() -> None:
    """Make transformers know the method "fp8kernels"; again is fine, importing this module is enough."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(Fp8KernelsConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(Fp8KernelsQuantizer)


def replace(model: nn.Module, name: str, entry: LayerEntry) -> InferenceLinear:
    """Put a layer without storage that holds codes in the place of a linear one; its tensors are yet to come.

    raises   ValueError if it is no linear layer, or blocks do not divide it
    """
    old = model.get_submodule(name)
    if not _is_linear(old):
        raise ValueError(f"layer {name!r} holds codes in the checkpoint and is a {type(old).__name__} in the model")
    shape = old.get_parameter("weight").shape
    outputs, inputs = reversed(shape) if isinstance(old, Conv1D) else shape
    try:
        new = inference_layer(inputs, outputs, bias=old.bias is not None, entry=entry, device="meta")
    except ValueError as error:
        raise ValueError(f"layer {name!r} [{outputs}, {inputs}]: {error}") from None
    new.weight = torch.empty(outputs, inputs, device="meta")  # some models' initialization reaches for it
    model.set_submodule(name, new.train(old.training))
    return new


def finish(model: nn.Module, layers: Mapping[str, LayerEntry]) -> None:
    """Take away what layers have for loading alone; refuse those not in the files, or with scales that decode nothing.

    raises   ValueError naming the layer
    """
    for name, entry in layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, InferenceLinear)
        del layer.weight
        tensors = {key: tensor for key, tensor in layer.named_buffers() if key != "bias"}
        if any(tensor.device.type == "meta" for tensor in tensors.values()):
            continue  # a rehearsal, without storage
        lost = [key for key, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if lost:
            raise ValueError(f"the files hold no {some(f'{name}.{key}' for key in lost)}; export the model again")
        check_scales(name, entry, tensors[SCALE], tensors[INPUT_SCALE])


def _in_model(model: Any, layers: Mapping[str, LayerEntry]) -> dict[str, LayerEntry]:
    """Layers under the model's own names: the files may have a prefix more or less, or older names.

    raises   ValueError naming layers that the model lacks
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    renamings = [rule for rule in get_model_conversion_mapping(model) if hasattr(rule, "rename_source_key")]
    prefixed = any(name.startswith(prefix) for name in layers)
    found, lost = {}, []
    for name, entry in layers.items():
        renamed = f"{name}."
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        candidates = (name, renamed.removesuffix("."), name.removeprefix(prefix), prefix + name)
        known = next((candidate for candidate in candidates if candidate in modules), None)
        if known is not None:
            found[known] = entry
        elif name.startswith(prefix) or not prefixed:  # else the head of another class of models, which is not built
            lost.append(name)
    if lost:
        raise ValueError(
            f"the checkpoint has {len(lost)} 8-bit layers that a {type(model).__name__} lacks: {some(lost)}; "
            "config.json is another model's"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


register()
