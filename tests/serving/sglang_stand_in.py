"""What SGLang's layers do with a quantization method, for machines without it; fake_server.py binds it to the record.

Layers make their parameters through create_weights, cut tensors of a checkpoint by the marks of a parameter, and give
their input to apply; nothing else of a server is here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from serving import fake_server
from torch import Tensor, nn

PATH = "sglang.srt.layers"
METHODS = f"{PATH}.quantization:QUANTIZATION_METHODS"
CPU_METHODS = f"{PATH}.quantization:CPU_QUANTIZATION_METHODS"
CHOICES = "sglang.srt.arg_groups.choices:QUANTIZATION_CHOICES"
PARALLEL = types.SimpleNamespace(tp_size=1, tp_rank=0)


def modules() -> dict[str, types.ModuleType]:
    """Stand-ins for SGLang's modules, as the record has them."""
    record = fake_server.load_record("sglang")
    choices = list(record["names"][CHOICES]["values"])
    methods = dict.fromkeys(record["names"][METHODS]["keys"])
    values: dict[str, Any] = {
        CHOICES: choices,
        "sglang.srt.arg_groups.choices:add_quantization_method_choices": choices.extend,
        METHODS: methods,
        f"{PATH}.quantization:get_quantization_config": methods.__getitem__,
        "sglang.srt.runtime_context:get_parallel": lambda: types.SimpleNamespace(override=_override),
    }
    made = fake_server.modules(record, _behaviours(), values)
    _linear.__dict__.update(vars(made[f"{PATH}.linear"]))
    _linear.vocab = made[f"{PATH}.vocab_parallel_embedding"].VocabParallelEmbedding  # type: ignore[attr-defined]
    return made


_linear = types.SimpleNamespace()  # the classes just made


@contextmanager
def _override(**values: int) -> Iterator[None]:
    before = dict(vars(PARALLEL))
    vars(PARALLEL).update(values)
    try:
        yield
    finally:
        vars(PARALLEL).update(before)


def _behaviours() -> dict[str, dict[str, Any]]:
    base = {"__init__": lambda self: setattr(self, "packed_modules_mapping", {})}
    return {
        f"{PATH}.quantization.base_config:QuantizationConfig": base,
        f"{PATH}.quantization.unquant:UnquantizedLinearMethod": {
            "create_weights": _plain_weights,
            "process_weights_after_loading": lambda self, layer: None,
        },
        f"{PATH}.linear:LinearBase": {"__init__": _base},
        f"{PATH}.linear:ReplicatedLinear": {"__init__": _replicated, "weight_loader": _load_whole},
        f"{PATH}.linear:ColumnParallelLinear": {"_initialize_partition": _column},
        f"{PATH}.linear:MergedColumnParallelLinear": {"__init__": _merged, "weight_loader": _load_part},
        f"{PATH}.linear:QKVParallelLinear": {"__init__": _qkv, "weight_loader": _load_part},
        f"{PATH}.linear:RowParallelLinear": {"__init__": _row, "weight_loader": _load_rows_cut},
        f"{PATH}.vocab_parallel_embedding:VocabParallelEmbedding": {
            "__init__": _vocab,
            "weight_loader": fake_server.load_vocab,
        },
        f"{PATH}.vocab_parallel_embedding:ParallelLMHead": {"__init__": _head},
    }


def _base(self: Any, input_size: int, output_size: int, *rest: Any) -> None:
    _, dtype, quant_config, prefix = rest
    nn.Module.__init__(self)
    self.input_size, self.output_size, self.params_dtype = input_size, output_size, dtype
    self.quant_method = quant_config.get_quant_method(self, prefix=prefix)


def _make(self: Any, owner: type, method: str, in_local: int, out_local: list[int], **more: Any) -> None:
    values = {
        "layer": self,
        "input_size_per_partition": in_local,
        "output_partition_sizes": out_local,
        "input_size": self.input_size,
        "output_size": self.output_size,
        "params_dtype": self.params_dtype,
        "weight_loader": self.weight_loader,
        **more,
    }
    fake_server.call(self, owner, method, "create_weights", values)


def _replicated(self: Any, inputs: int, outputs: int, *rest: Any) -> None:
    _, skip, dtype, config, prefix = rest
    _linear.LinearBase.__init__(self, inputs, outputs, skip, dtype, config, prefix)
    _make(self, _linear.ReplicatedLinear, "__init__", inputs, [outputs])


def _column(self: Any, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
    _, _, skip, dtype, config, _, prefix = rest
    _linear.LinearBase.__init__(self, input_size, output_size, skip, dtype, config, prefix)
    parts = [size // PARALLEL.tp_size for size in self.output_sizes]
    _make(
        self,
        _linear.ColumnParallelLinear,
        "_initialize_partition",
        input_size,
        parts,
        skip_block_quant_check=named["skip_block_quant_check"],
    )


def _merged(self: Any, input_size: int, output_sizes: list[int], *rest: Any, **named: Any) -> None:
    *_, dtype, config, prefix = rest
    self.__dict__["output_sizes"], self.__dict__["copies"] = output_sizes, {}
    self._initialize_partition(
        input_size, sum(output_sizes), params_dtype=dtype, quant_config=config, prefix=prefix, tp_group=None
    )


def _qkv(self: Any, hidden: int, head: int, heads: int, kv_heads: int, *rest: Any, **named: Any) -> None:
    *_, dtype, config, prefix = rest
    size = PARALLEL.tp_size
    copies = max(1, size // kv_heads)  # of each key and value head
    kv = max(1, kv_heads // size) * head * size
    self.__dict__["output_sizes"], self.__dict__["copies"] = [heads * head, kv, kv], {"k": copies, "v": copies}
    self._initialize_partition(
        hidden, heads * head + 2 * kv, params_dtype=dtype, quant_config=config, prefix=prefix, tp_group=None
    )


def _row(self: Any, inputs: int, outputs: int, *rest: Any, **named: Any) -> None:
    _, _, skip, dtype, _, config, prefix = rest
    _linear.LinearBase.__init__(self, inputs, outputs, skip, dtype, config, prefix)
    _make(self, _linear.RowParallelLinear, "__init__", inputs // PARALLEL.tp_size, [outputs])


def _vocab(self: Any, rows: int, width: int, **named: Any) -> None:
    nn.Module.__init__(self)
    padding = named["padding_size"]
    self.org_vocab_size, padded = rows, -(-rows // padding) * padding
    self.input_size, self.output_size, self.params_dtype = width, padded, named["params_dtype"]
    self.quant_method = named["quant_config"].get_quant_method(self, prefix=named["prefix"])
    _make(self, _linear.vocab, "__init__", width, [padded])


def _head(self: Any, rows: int, width: int, **named: Any) -> None:
    kept = {key: named[key] for key in ("params_dtype", "padding_size", "quant_config", "prefix")}
    _linear.vocab.__init__(self, rows, width, **kept)


def _plain_weights(self: Any, layer: Any, in_local: int, out_local: list[int], *rest: Any, **named: Any) -> None:
    layer.weight = nn.Parameter(torch.empty(sum(out_local), in_local, dtype=rest[2]), requires_grad=False)


def _load_whole(self: Any, param: Any, tensor: Tensor) -> None:
    fake_server.copy_into(param.data, tensor)


def _load_part(self: Any, param: Any, tensor: Tensor, part: Any) -> None:
    names = ["q", "k", "v"] if "k" in self.copies else list(range(len(self.output_sizes)))
    if part is None and getattr(param, "output_dim", None) is not None:  # fused in the checkpoint
        for name, rows in zip(names, tensor.split(self.output_sizes, dim=param.output_dim), strict=True):
            self.weight_loader(param, rows, name)
        return
    data, number = param.data, 0 if part is None else names.index(part)
    if getattr(param, "output_dim", None) is not None:
        sizes = [size // PARALLEL.tp_size for size in self.output_sizes]
        data = data.narrow(param.output_dim, sum(sizes[:number]), sizes[number])
        rank = PARALLEL.tp_rank // self.copies.get(part, 1)
        tensor = tensor.narrow(param.output_dim, rank * sizes[number], sizes[number])
    elif getattr(param, "needs_scalar_to_array", False):
        assert tensor.shape[0] == 1
        data, tensor = data[number], tensor[0]
    fake_server.copy_into(data, tensor)


def _load_rows_cut(self: Any, param: Any, tensor: Tensor) -> None:
    dim = getattr(param, "input_dim", None)
    if dim is not None:
        size = param.data.shape[dim]
        tensor = tensor.narrow(dim, PARALLEL.tp_rank * size, size)
    fake_server.copy_into(param.data, tensor)
