"""vLLM's plug-in: native checkpoints (HiF8, E4M3 and E5M2 codes) are served by vLLM with our products.

vLLM finds `register` through the entry-point group `vllm.general_plugins` in every process it starts, and takes the
method by itself where config.json's quantization_config says `"quant_method": "fp8kernels"`.
"""

from __future__ import annotations

from ...export.config import QUANT_METHOD


def register() -> None:
    """Make vLLM know the method "fp8kernels"; calling it again changes nothing.

    raises   ImportError where vLLM is absent, or has another interface than the plug-in is written for
    source   vLLM 0.33, docs/design/plugin_system.md
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .config import Fp8KernelsConfig
    except ImportError as error:
        raise ImportError(
            f"fp8kernels' plug-in for vLLM needs vllm>=0.33 ({error}); without it: fp8kernels serve FOLDER"
        ) from error
    register_quantization_config(QUANT_METHOD)(Fp8KernelsConfig)


__all__ = ["register"]
