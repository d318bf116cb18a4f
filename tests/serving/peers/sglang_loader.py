"""Load exported folders through SGLang's own code and hold what its layers then contain against the files.

    python tests/serving/peers/sglang_loader.py FOLDER…

with an interpreter that has SGLang 0.5.23 and fp8kernels. No GPU is needed. SGLang's plug-in point, ServerArgs,
ModelConfig, quantization config, choice of scheme, model class, create_weights, weight loaders and
process_weights_after_loading run as they are. These stand in for what a machine without a GPU lacks, and are printed:

    sgl_per_tensor_quant_fp8       the CUDA kernel by which SGLang brings the parts of a fused layer to one scale:
                                   round(x * (1 / scale)) to E4M3, saturating
    dispatch_w8a8_block_fp8_linear the choice of a product for 128x128 blocks, which asks for a GPU: nothing is computed
    the GPU's capability           said to be 8.9, the least that SGLang multiplies E4M3 on
    vllm._custom_ops               the rotation of positions that SGLang imports off a GPU: never called

Per linear layer of SGLang the decoded weight must be the file's, every number, and the input scale the file's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from vllm_loader import Row, rows_of

from fp8kernels.formats import E4M3

PORT = 29573  # of the process group of one
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STAND_INS = (
    "sgl_per_tensor_quant_fp8",
    "dispatch_w8a8_block_fp8_linear",
    "the GPU's capability",
    "vllm._custom_ops",
)
CAPABILITY = (8, 9)


def stand_in() -> None:
    """What a machine without a GPU lacks; see the module's docstring."""
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        package, ops = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
        ops.rotary_embedding = None  # type: ignore[attr-defined]
        sys.modules.update({"vllm": package, "vllm._custom_ops": ops})
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.srt.layers.quantization import fp8, utils
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8 as scheme

    for module in (fp8_kernel, fp8, utils):
        if hasattr(module, "scaled_fp8_quant"):
            module.scaled_fp8_quant = _scaled_fp8_quant
    for module in (fp8, scheme):
        module.dispatch_w8a8_block_fp8_linear = lambda *given, **named: None
    torch.cuda.get_device_capability = lambda *given: CAPABILITY
    fp8.get_device_capability = lambda *given: CAPABILITY


def _scaled_fp8_quant(x: Tensor, scale: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    scaled = x.float() * (1.0 / scale.float())
    return E4M3.encode(scaled.clamp(-E4M3.max, E4M3.max)).view(torch.float8_e4m3fn), scale


def load(folder: Path, dtype: str = "bfloat16") -> tuple[nn.Module, Any]:
    """SGLang's model of a folder, and its ModelConfig."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.model_loader import get_model
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    stand_in()
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", dtype=dtype, skip_tokenizer_init=True, attention_backend="torch_native"
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{PORT}", 0, backend="gloo")
        initialize_model_parallel(backend="gloo")
    config = ModelConfig.from_server_args(arguments)
    model = get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    return model, config


def compare(model: nn.Module, folder: Path) -> list[Row]:
    """One row for each linear layer whose weight the files hold in 8 bits."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    return rows_of(model, folder, (LinearBase, ParallelLMHead), PACKED)


def main(folders: list[str]) -> int:
    """Print the rows of every folder; 1 if a number differs."""
    import sglang

    print(f"sglang {sglang.__version__}, torch {torch.__version__}; stood in for: {', '.join(STAND_INS)}")
    wrong = 0
    for folder in map(Path, folders):
        try:
            model, config = load(folder)
        except ValueError as error:
            wrong += 1
            print(f"{folder.name}: refused by SGLang: {error}")
            continue
        rows = compare(model, folder)
        bad = [row for row in rows if not row.exact]
        wrong += bool(bad) or not rows
        print(f"{folder.name}: {config.quantization}, {len(rows)} layers in 8 bits, {len(bad)} differ")
        for method in sorted({row.method for row in rows}):
            print(f"  {method}: {sum(row.method == method for row in rows)} layers")
        for row in bad:
            print(f"  {row.name}: {row.changed} of {row.size} codes, {row.worst:.3g} of the largest, scale {row.scale}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
