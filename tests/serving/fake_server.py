"""Stand-ins for a server's classes, made from a record of its interface (record_interface.py).

Bases, abstract methods and parameters are the record's: every call is bound to the recorded parameters before a
behaviour sees it, so that a stand-in cannot take what the server does not, and what a layer gives to its quant_method
must be what the record says the server gives. A method without a behaviour raises NotImplementedError.
"""

from __future__ import annotations

import abc
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8kernels.export.layout import CODES, INPUT_SCALE, SCALE

FOLDER = Path(__file__).parent / "recorded"
Behaviours = Mapping[str, Mapping[str, Callable[..., Any]]]  # by "module:Class", then by method


def load_record(server: str) -> dict[str, Any]:
    """The newest record of a server."""
    path = sorted(FOLDER.glob(f"{server}-*.json"))[-1]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def modules(record: dict[str, Any], behaviours: Behaviours, values: Mapping[str, Any]) -> dict[str, types.ModuleType]:
    """The modules of the record, by name, with the packages they are in.

    behaviours  what the methods of a class do
    values      functions, and tables and lists that are not just their recorded names
    raises      AssertionError for a behaviour or value the record does not know
    """
    named: dict[str, Any] = record["names"]
    for name in [*behaviours, *values]:
        assert name in named, f"{name} is a stand-in for something {record['server']} does not have"
    found: dict[str, types.ModuleType] = {}
    for name in named:
        module = name.partition(":")[0]
        for end in range(1, len(module.split(".")) + 1):
            part = ".".join(module.split(".")[:end])
            if part not in found:
                found[part] = types.ModuleType(part)
                found[part].__path__ = []  # type: ignore[attr-defined]
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(found[parent], last, module)
    found[record["server"]].__version__ = record["version"]  # type: ignore[attr-defined]
    made: dict[str, Any] = {"torch.nn.modules.module:Module": nn.Module, "abc:ABC": abc.ABC, "builtins:object": object}
    for name, entry in named.items():
        if name in values:
            made[name] = values[name]
            if entry["kind"] == "function" and "method" not in entry:
                made[name] = _bound(name, entry, values[name])
        elif entry["kind"] == "class":
            made[name] = _class(name, entry, made, behaviours.get(name, {}))
        elif entry["kind"] == "text":
            made[name] = entry["value"]
        elif entry["kind"] == "table":
            made[name] = dict.fromkeys(entry["keys"])
        elif entry["kind"] == "list":
            made[name] = list(entry["values"])
        module, _, last = name.partition(":")
        if name in made:
            setattr(found[module], last, made[name])
    return found


def install(found: Mapping[str, types.ModuleType], monkeypatch: Any) -> None:
    """Importable as the server's own, until the test ends."""
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)


def call(layer: nn.Module, owner: type, method: str, called: str, values: dict[str, Any]) -> Any:
    """Call layer.quant_method as the server's `owner.method` does, by the record: so many positional arguments, these
    keywords; `values` by the names of the base method's parameters.

    raises   AssertionError where the record's call has other arguments than `values`
    """
    positional, keywords = owner.recorded[method]["calls"][called]  # type: ignore[attr-defined]
    names = list(values)
    if positional + len(keywords) != len(names) or not set(keywords) <= set(names):
        raise AssertionError(f"{owner.__name__}.{method} calls {called} with {positional} and {keywords}, not {names}")
    first = [values[name] for name in names if name not in keywords]
    return getattr(layer.quant_method, called)(*first, **{name: values[name] for name in keywords})


def load_vocab(self: Any, param: Any, tensor: Tensor) -> None:
    """The loader of an embedding or head without ranks: rows beyond the checkpoint's are 0."""
    if getattr(param, "output_dim", None) is None:
        copy_into(param.data, tensor)
        return
    assert tensor.shape[param.output_dim] == self.org_vocab_size
    copy_into(param.data[: tensor.shape[0]], tensor)
    param.data[tensor.shape[0] :].fill_(0)


def copy_into(data: Tensor, tensor: Tensor) -> None:
    """As both servers do: shapes are equal, or nothing is copied."""
    assert data.shape == tensor.shape, f"{tuple(data.shape)} takes no {tuple(tensor.shape)}"
    data.copy_(tensor)


def fill(layer: Any, tensors: dict[str, Tensor], parent: str, parts: dict[str, Any]) -> Any:
    """Hand over a checkpoint's tensors as the servers' models do, then let the method process them."""
    for name, part in parts.items():
        for key in (CODES, SCALE, INPUT_SCALE):
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensors[f"{parent}.{name}.{key}"], *(() if part is None else (part,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same normal numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _class(name: str, entry: dict[str, Any], made: dict[str, Any], behaviours: Mapping[str, Any]) -> type:
    unknown = set(behaviours) - set(entry["methods"])
    if unknown:
        raise KeyError(f"{name} has no methods {sorted(unknown)}")
    body: dict[str, Any] = {"recorded": entry["methods"], "__module__": name.partition(":")[0]}
    for method, described in entry["methods"].items():
        function = _bound(f"{name}.{method}", described, behaviours.get(method))
        if method in entry["abstract"]:
            function = abc.abstractmethod(function)
        body[method] = {"classmethod": classmethod, "staticmethod": staticmethod}.get(described["of"], _same)(function)
    bases = tuple(made[base] for base in entry["bases"])
    made_class = type(bases[0])(name.rpartition(":")[2], bases, body) if bases else type(name, (), body)
    if sorted(getattr(made_class, "__abstractmethods__", ())) != entry["abstract"]:
        raise AssertionError(f"{name}: abstract are {sorted(made_class.__abstractmethods__)}, not {entry['abstract']}")
    return made_class


def _same(function: Any) -> Any:
    return function


def _bound(name: str, described: dict[str, Any], behaviour: Callable[..., Any] | None) -> Any:
    """A function with the recorded parameters, which it binds before the behaviour sees them."""
    signature = inspect.Signature(
        [
            inspect.Parameter(
                parameter,
                getattr(inspect._ParameterKind, kind),
                default=inspect.Parameter.empty if default is None else _value(default),
            )
            for parameter, kind, default in described["parameters"]
        ]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if behaviour is None:
            raise NotImplementedError(f"{name} has no behaviour here")
        bound.apply_defaults()
        return behaviour(*bound.args, **bound.kwargs)

    function.__name__ = name.rpartition(".")[2]
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _value(text: str) -> Any:
    """A recorded default: a plain value, or one that no behaviour looks at."""
    try:
        return eval(text, {"__builtins__": {}, "torch": torch})  # a repr from our own record
    except Exception:
        return text
