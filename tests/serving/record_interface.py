"""Record what the plug-ins use of a server, for tests where that server is not installed.

    python tests/serving/record_interface.py sglang     # with an interpreter that has the server

writes recorded/<server>-<version>.json: of classes the bases, the abstract methods, and the parameters of every method
that is defined there with the arguments it gives to create_weights and apply; of functions their parameters; of tables
and lists of names what stands in them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recorded"
CALLED = ("create_weights", "apply", "process_weights_after_loading")
WANTED = {
    "sglang": {
        "sglang.srt.arg_groups.choices": ["QUANTIZATION_CHOICES", "add_quantization_method_choices"],
        "sglang.srt.runtime_context": ["get_parallel"],
        "sglang.srt.layers.quantization": [
            "QUANTIZATION_METHODS",
            "CPU_QUANTIZATION_METHODS",
            "get_quantization_config",
        ],
        "sglang.srt.layers.quantization.base_config": ["QuantizeMethodBase", "LinearMethodBase", "QuantizationConfig"],
        "sglang.srt.layers.quantization.unquant": ["UnquantizedLinearMethod"],
        "sglang.srt.layers.vocab_parallel_embedding": ["VocabParallelEmbedding", "ParallelLMHead"],
        "sglang.srt.layers.linear": [
            "WEIGHT_LOADER_V2_SUPPORTED",
            "LinearBase",
            "ReplicatedLinear",
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "RowParallelLinear",
        ],
    },
    "vllm": {  # VLLM_TARGET_DEVICE=cpu where there is no GPU
        "vllm.plugins": ["DEFAULT_PLUGINS_GROUP"],
        "vllm.model_executor.custom_op": ["PluggableLayer"],
        "vllm.model_executor.layers.quantization.base_config": ["QuantizeMethodBase", "QuantizationConfig"],
        "vllm.model_executor.layers.quantization": [
            "QUANTIZATION_METHODS",
            "register_quantization_config",
            "get_quantization_config",
        ],
        "vllm.model_executor.layers.linear": [
            "WEIGHT_LOADER_V2_SUPPORTED",
            "get_tensor_model_parallel_rank",
            "get_tensor_model_parallel_world_size",
            "LinearMethodBase",
            "UnquantizedLinearMethod",
            "LinearBase",
            "ReplicatedLinear",
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "RowParallelLinear",
        ],
        "vllm.model_executor.layers.vocab_parallel_embedding": ["VocabParallelEmbedding", "ParallelLMHead"],
        "vllm.model_executor.models.utils": ["WeightsMapper"],
    },
}


def record(server: str) -> dict[str, Any]:
    """What `server`, importable here, shows of the wanted names."""
    found = {
        f"{module}:{name}": _described(getattr(importlib.import_module(module), name))
        for module, names in WANTED[server].items()
        for name in names
    }
    return {"server": server, "version": importlib.import_module(server).__version__, "names": found}


def parameters(function: Any) -> list[list[str | None]]:
    """Each parameter's name, kind and default as text."""
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in inspect.signature(function).parameters.values()
    ]


def calls(function: Any) -> dict[str, list[Any]]:
    """How it calls a layer's quant_method: per method the number of positional arguments and the keywords."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by dataclass
        return {}
    return {
        call.func.attr: [len(call.args), sorted(str(keyword.arg) for keyword in call.keywords)]
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in CALLED
        and "quant_method" in ast.unparse(call.func.value)
    }


def _described(thing: Any) -> dict[str, Any]:
    if inspect.isclass(thing):
        own = {name: value for name, value in vars(thing).items() if inspect.isroutine(getattr(thing, name, None))}
        return {
            "kind": "class",
            "bases": [f"{base.__module__}:{base.__name__}" for base in thing.__bases__],
            "abstract": sorted(getattr(thing, "__abstractmethods__", ())),
            "methods": {
                name: {
                    "of": type(value).__name__,
                    "parameters": parameters(getattr(value, "__func__", value)),
                    "calls": calls(getattr(value, "__func__", value)),
                }
                for name, value in sorted(own.items())
                if inspect.isfunction(getattr(value, "__func__", value))
            },
        }
    if isinstance(thing, str):
        return {"kind": "text", "value": thing}
    if isinstance(thing, dict):
        return {"kind": "table", "keys": sorted(map(str, thing))}
    if isinstance(thing, (list, tuple)):
        return {"kind": "list", "values": sorted(map(str, thing))}
    if inspect.isbuiltin(thing):  # a bound method of a list
        return {"kind": "function", "parameters": [], "method": thing.__name__}
    return {"kind": "function", "parameters": parameters(thing)}


if __name__ == "__main__":
    written = record(sys.argv[1])
    path = FOLDER / f"{written['server']}-{written['version']}.json"
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(path)
