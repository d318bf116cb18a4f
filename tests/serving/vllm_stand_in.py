"""What vLLM's layers do with a quantization method, for machines without it; fake_server.py binds it to the record.

Layers make their parameters through create_weights, cut tensors of a checkpoint by the marks of a parameter, and give
their input to apply; nothing else of a server is here.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from serving import fake_server
from torch import Tensor, nn

PATH = "vllm.model_executor.layers"
METHODS = f"{PATH}.quantization:QUANTIZATION_METHODS"
LOADED = types.SimpleNamespace()  # vLLM's linear and vocab_parallel_embedding, as just made


def modules() -> dict[str, types.ModuleType]:
    """Stand-ins for vLLM's modules, as the record has them."""
    record = fake_server.load_record("vllm")
    methods, classes = list(record["names"][METHODS]["values"]), {}

    def register(quantization: str) -> Callable[[type], type]:
        def keep(found: type) -> type:
            if quantization not in methods:
                methods.append(quantization)
            classes[quantization] = found
            return found

        return keep

    values: dict[str, Any] = {
        METHODS: methods,
        f"{PATH}.quantization:register_quantization_config": register,
        f"{PATH}.quantization:get_quantization_config": classes.__getitem__,
        f"{PATH}.linear:get_tensor_model_parallel_rank": lambda: 0,
        f"{PATH}.linear:get_tensor_model_parallel_world_size": lambda: 1,
    }
    made = fake_server.modules(record, _behaviours(), values)
    LOADED.linear, LOADED.vocab = made[f"{PATH}.linear"], made[f"{PATH}.vocab_parallel_embedding"]
    return made


def _behaviours() -> dict[str, dict[str, Any]]:
    return {
        "vllm.model_executor.custom_op:PluggableLayer": {"__new__": lambda cls, *args, **named: object.__new__(cls)},
        "vllm.model_executor.models.utils:WeightsMapper": {"__init__": _mapper, "apply_dict": _renamed},
        f"{PATH}.quantization.base_config:QuantizationConfig": {
            "__init__": lambda self: setattr(self, "packed_modules_mapping", {})
        },
        f"{PATH}.linear:UnquantizedLinearMethod": {"__init__": lambda self: None, "create_weights": _plain_weights},
        f"{PATH}.linear:LinearBase": {"__init__": _base},
        f"{PATH}.linear:ReplicatedLinear": {"__init__": _replicated, "weight_loader": _load_whole, "forward": _forward},
        f"{PATH}.linear:ColumnParallelLinear": {"__init__": _column, "forward": _forward},
        f"{PATH}.linear:MergedColumnParallelLinear": {"__init__": _merged, "weight_loader": _load_part},
        f"{PATH}.linear:QKVParallelLinear": {"__init__": _qkv, "weight_loader": _load_part},
        f"{PATH}.linear:RowParallelLinear": {"__init__": _row, "weight_loader": _load_columns, "forward": _forward},
        f"{PATH}.vocab_parallel_embedding:VocabParallelEmbedding": {
            "__init__": _vocab,
            "weight_loader": fake_server.load_vocab,
        },
        f"{PATH}.vocab_parallel_embedding:ParallelLMHead": {"__init__": _head},
    }


def _ranks() -> tuple[int, int]:
    return LOADED.linear.get_tensor_model_parallel_rank(), LOADED.linear.get_tensor_model_parallel_world_size()


def _mapper(self: Any, *tables: Any) -> None:
    self.prefixes = tables[4]


def _renamed(self: Any, values: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        old = next((prefix for prefix in self.prefixes if name.startswith(prefix)), None)
        found[name if old is None else name.replace(old, self.prefixes[old], 1)] = value
    return found


def _base(self: Any, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
    _, self_skip, dtype, config, prefix = rest
    kept = dict(self.__dict__)  # what a subclass has noted before
    nn.Module.__init__(self)
    self.__dict__.update(kept)
    self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, self_skip
    self.params_dtype = dtype or torch.get_default_dtype()
    self.tp_rank, self.tp_size = _ranks()
    self.quant_method = config.get_quant_method(self, prefix=prefix)
    self.bias = None


def _make(self: Any, owner: type, in_local: int, out_local: list[int]) -> None:
    values = {
        "layer": self,
        "input_size_per_partition": in_local,
        "output_partition_sizes": out_local,
        "input_size": self.input_size,
        "output_size": self.output_size,
        "params_dtype": self.params_dtype,
        "weight_loader": self.weight_loader,
    }
    fake_server.call(self, owner, "__init__", "create_weights", values)


def _replicated(self: Any, inputs: int, outputs: int, *rest: Any, **named: Any) -> None:
    LOADED.linear.LinearBase.__init__(self, inputs, outputs, *rest)
    _make(self, LOADED.linear.ReplicatedLinear, inputs, [outputs])


def _column(self: Any, inputs: int, outputs: int, *rest: Any, **named: Any) -> None:
    bias, _, skip, dtype, config, prefix = rest
    LOADED.linear.LinearBase.__init__(self, inputs, outputs, bias, skip, dtype, config, prefix)
    parts = [size // self.tp_size for size in self.output_sizes]
    _make(self, LOADED.linear.ColumnParallelLinear, inputs, parts)


def _merged(self: Any, inputs: int, sizes: list[int], *rest: Any, **named: Any) -> None:
    self.__dict__["output_sizes"], self.__dict__["copies"] = sizes, {}
    LOADED.linear.ColumnParallelLinear.__init__(self, inputs, sum(sizes), *rest)


def _qkv(self: Any, hidden: int, head: int, heads: int, kv_heads: int, *rest: Any, **named: Any) -> None:
    size = _ranks()[1]
    copies = max(1, size // kv_heads)  # of each key and value head
    kv = max(1, kv_heads // size) * head * size
    self.__dict__["output_sizes"], self.__dict__["copies"] = [heads * head, kv, kv], {"k": copies, "v": copies}
    bias, skip, dtype, config, prefix = rest
    outputs = heads * head + 2 * kv
    LOADED.linear.ColumnParallelLinear.__init__(self, hidden, outputs, bias, False, skip, dtype, config, prefix)


def _row(self: Any, inputs: int, outputs: int, *rest: Any, **named: Any) -> None:
    bias, _, skip, dtype, _, config, prefix = rest
    LOADED.linear.LinearBase.__init__(self, inputs, outputs, bias, skip, dtype, config, prefix)
    _make(self, LOADED.linear.RowParallelLinear, inputs // self.tp_size, [outputs])


def _vocab(self: Any, rows: int, width: int, *rest: Any, **named: Any) -> None:
    dtype, _, padding, config, prefix = rest
    nn.Module.__init__(self)
    self.org_vocab_size, padded = rows, -(-rows // padding) * padding
    self.input_size, self.output_size = width, padded
    self.params_dtype = dtype or torch.get_default_dtype()
    self.quant_method = config.get_quant_method(self, prefix=prefix)
    if self.quant_method is not None:
        _make(self, LOADED.vocab.VocabParallelEmbedding, width, [padded])


def _head(self: Any, rows: int, width: int, *rest: Any, **named: Any) -> None:
    LOADED.vocab.VocabParallelEmbedding.__init__(self, rows, width, *rest[1:])  # the first is bias


def _plain_weights(self: Any, layer: Any, in_local: int, out_local: list[int], *rest: Any, **named: Any) -> None:
    layer.weight = nn.Parameter(torch.empty(sum(out_local), in_local, dtype=rest[2]), requires_grad=False)


def _forward(self: Any, x: Tensor) -> tuple[Tensor, None]:
    owner = next(cls for cls in type(self).__mro__ if "forward" in vars(cls))
    return fake_server.call(self, owner, "forward", "apply", {"layer": self, "x": x, "bias": self.bias}), None


def _load_whole(self: Any, param: Any, tensor: Tensor) -> None:
    fake_server.copy_into(param.data, tensor)


def _load_part(self: Any, param: Any, tensor: Tensor, part: Any) -> None:
    names = ["q", "k", "v"] if "k" in self.copies else list(range(len(self.output_sizes)))
    output_dim = getattr(param, "output_dim", None)
    if part is None and output_dim is not None:  # fused in the checkpoint
        for name, rows in zip(names, tensor.split(self.output_sizes, dim=output_dim), strict=True):
            self.weight_loader(param, rows, name)
        return
    data, number = param.data, 0 if part is None else names.index(part)
    if output_dim is not None:
        sizes = [size // self.tp_size for size in self.output_sizes]
        data = data.narrow(output_dim, sum(sizes[:number]), sizes[number])
        rank = self.tp_rank // self.copies.get(part, 1)
        tensor = tensor.narrow(output_dim, rank * sizes[number], sizes[number])
    elif getattr(param, "needs_scalar_to_array", False):
        assert tensor.shape[0] == 1
        data, tensor = data[number], tensor[0]
    fake_server.copy_into(data, tensor)


def _load_columns(self: Any, param: Any, tensor: Tensor) -> None:
    dim = getattr(param, "input_dim", None)
    if dim is not None:
        size = param.data.shape[dim]
        tensor = tensor.narrow(dim, self.tp_rank * size, size)
    fake_server.copy_into(param.data, tensor)
