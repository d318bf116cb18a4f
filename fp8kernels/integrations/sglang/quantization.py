"""SGLang's two classes of a quantization method, for native checkpoints: the config and a linear layer's method."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import Tensor, nn

from ...export.config import QUANT_METHOD, entries
from ...export.layout import LayerEntry
from ...export.stored import FUSED
from ...headers import some
from ..served_linear import apply, create, finish, layer_entry

# What SGLang's models fuse where their class does not say so itself: most do not.
PACKED = {fused: list(parts) for fused, parts in FUSED.items()}
MIN_CAPABILITY = 80  # compute capability times ten; the Triton kernels need Ampere


class NativeConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a native checkpoint as SGLang keeps it.

    layers   how each 8-bit layer of the checkpoint reads its codes; all others are in high precision
    packed   the parts of the model's fused layers
    """

    def __init__(self, layers: dict[str, LayerEntry], packed: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.packed_modules_mapping = PACKED | (packed or {})
        self.found = False  # whether any layer of the model stands in the checkpoint

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        """From config.json's entry, to which SGLang adds `packed_modules_mapping` and `hf_config`.

        raises   ValueError naming the field that says what no layer can mean
        """
        return cls(entries(config), config.get("packed_modules_mapping"))

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        """What a model's class says of its fused layers goes before what most models do."""
        self.packed_modules_mapping = self.packed_modules_mapping | mapping

    def get_name(self) -> str:
        """The name that `--quantization` takes."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes a model may run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least compute capability of a GPU."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says all of it."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """None: activations have no scale of their own."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer, or None where SGLang's own choice stands.

        raises   ValueError where the parts of a fused layer are not read alike, or experts hold codes
        """
        if isinstance(layer, LinearBase):
            entry = layer_entry(self.layers, prefix, self.packed_modules_mapping)
            if entry is None:
                return HighPrecisionMethod(self, prefix)
            self.found = True
            return NativeLinearMethod(entry, prefix)
        if isinstance(layer, ParallelLMHead):
            entry = layer_entry(self.layers, prefix, self.packed_modules_mapping)
            return None if entry is None else NativeLinearMethod(entry, prefix)
        inside = next((name for name in self.layers if name.startswith(f"{prefix}.")), None)
        if inside is not None and _of_experts(layer):
            raise ValueError(
                f"{prefix} is a {type(layer).__name__}, whose experts SGLang multiplies with kernels of its own, which "
                f"read no codes of ours ({inside} holds some): convert without the experts and export again"
            )
        return None

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Names of the checkpoint become those of SGLang's model."""
        self.layers = hf_to_sglang_mapper.apply_dict(self.layers)


class NativeLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer that holds codes, of any of SGLang's kinds: replicated, cut by columns or rows, merged, q/k/v."""

    def __init__(self, entry: LayerEntry, prefix: str) -> None:
        self.entry, self.prefix = entry, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the layer's parameters; SGLang fills them by the names in the checkpoint.

        raises   ValueError if a block does not divide this rank's part
        """
        create(
            layer,
            self.entry,
            name=self.prefix,
            in_local=input_size_per_partition,
            out_local=output_partition_sizes,
            weight_loader=extra_weight_attrs["weight_loader"],
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all came, and make what apply needs.

        raises   ValueError naming what did not come, or a scale that decodes nothing
        """
        finish(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        return apply(layer, x, bias)


class HighPrecisionMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """SGLang's own method, which also sees to it that the checkpoint's layers are the model's.

    SGLang passes over tensors of names it does not know, and would run on weights that nobody has set.
    """

    def __init__(self, config: NativeConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.prefix = config, prefix

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As SGLang's.

        raises   ValueError if no layer of the model stands in the checkpoint
        """
        if not self.config.found:
            raise ValueError(
                f"none of the 8-bit layers of the checkpoint ({some(self.config.layers)}) is one of SGLang's model, "
                f"which has {self.prefix!r}: the model names or fuses its layers in another way; export the model with "
                f"format='compressed-tensors'"
            )
        super().process_weights_after_loading(layer)


def _of_experts(layer: nn.Module) -> bool:
    return any(kind.__name__ == "FusedMoE" for kind in type(layer).__mro__)
