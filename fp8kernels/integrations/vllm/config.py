"""The method "fp8kernels" in vLLM's words: which layers hold codes, and how such a layer is filled and computed.

Imported by `register` alone, as it needs vLLM. What happens to the tensors is in ../served_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ...export.config import QUANT_METHOD, entries
from ...export.layout import LayerEntry
from .. import served_linear

CAPABILITY = 80  # compute capability 8.0, the oldest that the kernels for NVIDIA GPUs are built for


class Fp8KernelsConfig(QuantizationConfig):
    """What the entry `quantization_config` of a native checkpoint says: its layers, each with how its codes are read.

    vLLM renames modules (`apply_vllm_mapper`) and fuses layers (`packed_modules_mapping`): both are followed. An entry
    `kv_cache` is not: vLLM's caches hold none of these formats, so keys and values take `--kv-cache-dtype`.
    """

    def __init__(self, layers: dict[str, LayerEntry]) -> None:
        super().__init__()
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp8KernelsConfig:
        """raises ValueError naming the field of the entry that is damaged or of another version."""
        return cls(entries(config))

    def get_name(self) -> str:
        """The word of `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What inputs may be: all that the products take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability times ten."""
        return CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says it all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The layers' names as the model class of vLLM has them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a module of vLLM is computed; None leaves it to vLLM's own, in high precision.

        raises   ValueError where a fused layer's parts are not read alike, and where codes belong to a module that
                 only a table lookup or vLLM's fused experts can be
        """
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            entry = served_linear.layer_entry(self.layers, prefix, self.packed_modules_mapping)
            if entry is not None:
                return Fp8KernelsLinearMethod(entry, prefix)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.layers:
            raise ValueError(f"{prefix}: the checkpoint holds an embedding in 8 bits, which vLLM cannot look up")
        if "experts" in prefix.split("."):
            inside = [name for name in self.layers if name.startswith(f"{prefix}.")]
            if inside:
                raise ValueError(
                    f"{prefix}: the checkpoint holds {len(inside)} linear layers of experts in 8 bits, {inside[0]} "
                    f"first, and vLLM computes experts as one; export with the experts left in high precision, or as "
                    f"compressed-tensors"
                )
        return None


class Fp8KernelsLinearMethod(LinearMethodBase):
    """y = decode(quantize(x)) @ decode(weight_codes).T + bias, for one layer of vLLM, fused or not, of one rank."""

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
        """Parameters that vLLM's loaders fill part by part.

        raises   ValueError if a block does not divide what this rank has of the layer
        """
        weight_loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        served_linear.create(
            layer,
            self.entry,
            name=self.prefix,
            in_local=input_size_per_partition,
            out_local=output_partition_sizes,
            weight_loader=weight_loader,
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """raises ValueError naming a tensor that never came, or a scale that decodes nothing."""
        served_linear.finish(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]: one product, or one for each run of parts that share an input scale."""
        return served_linear.apply(layer, x, bias)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """raises ValueError: the head has codes of its own, so the config must not tie it."""
        raise ValueError(
            f"{self.prefix}: the checkpoint holds the head in 8 bits and its config.json ties it to the embedding; "
            f"set tie_word_embeddings to false there, or export again"
        )
