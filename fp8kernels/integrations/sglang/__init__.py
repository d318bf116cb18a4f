"""SGLang reads native checkpoints, HiF8 included: found by SGLang through the entry point group `sglang.srt.plugins`.

    pip install fp8kernels                     # beside SGLang, in its environment
    python -m sglang.launch_server --model-path FOLDER

config.json of the folder names the method; no option is needed. Written for the interfaces of SGLang 0.5.23.
"""

from __future__ import annotations

from ...export.config import QUANT_METHOD


def register() -> None:
    """Make the method "fp8kernels" known to SGLang in this process. Again and again does no harm."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers import quantization

    from .quantization import NativeConfig

    quantization.QUANTIZATION_METHODS[QUANT_METHOD] = NativeConfig
    quantization.CPU_QUANTIZATION_METHODS[QUANT_METHOD] = NativeConfig  # looked at first on CPUs with AMX
    if QUANT_METHOD not in choices.QUANTIZATION_CHOICES:
        choices.add_quantization_method_choices([QUANT_METHOD])
