"""What a forward does with a value, read from its source: which submodules take it, and whether anything else does.

Only what the source shows is believed. A value that is aliased, put into a container, given to a function or read in a
loop is "read in another way", and whoever asked leaves the module as it is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..nn.producer import Place, Producer
from ..nn.state import ScaledLayer

HARMLESS = {"shape", "dtype", "device", "ndim", "size", "dim"}  # attributes that do not look at the numbers
NESTED = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)
OPAQUE = (
    ast.For, ast.While, ast.Try, ast.Match, ast.FunctionDef, ast.ClassDef, ast.AsyncFor, ast.AsyncWith
)  # fmt: skip


class Unreadable(Exception):
    """The source does not show where a value goes; the message says why, in words."""


class Use(NamedTuple):
    """A value handed to self.<path>(…), as the argument of that position or name."""

    path: str
    argument: int | str


def forward_of(module: nn.Module) -> ast.FunctionDef:
    """The forward of a module's class, as a syntax tree.

    raises   Unreadable if it was replaced on the module, or has no source
    """
    if "forward" in module.__dict__:
        raise Unreadable(f"forward of this {type(module).__name__} was replaced")
    cls = module.fp8_original if isinstance(module, Producer) else type(module)
    return _parse(inspect.unwrap(cls.forward))


@functools.lru_cache(maxsize=1024)
def _parse(function: Any) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError) as error:
        raise Unreadable(f"{function.__qualname__} has no source: {error}") from None
    if not isinstance(tree, ast.FunctionDef):
        raise Unreadable(f"{function.__qualname__} is no plain function")
    return tree


def readers(module: nn.Module, origin: str) -> list[Place]:
    """The 8-bit linear layers that read the result of `self.<origin>(…)` in a module's forward.

    raises   Unreadable unless these are all that do
    """
    function = forward_of(module)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _path(node.func) == origin]
    if not calls:
        raise Unreadable(f"forward of {_name(module)} does not call it by name")
    if len(calls) > 1:
        raise Unreadable(f"{_name(module)} calls it {len(calls)} times")
    if sum(isinstance(node, ast.Attribute) and _path(node) == origin for node in ast.walk(function)) > 1:
        raise Unreadable(f"forward of {_name(module)} does more with it than call it")
    for cls in type(module).__mro__[: -len(nn.Module.__mro__)]:
        for name, method in vars(cls).items():
            used = getattr(method, "__code__", None)
            if name not in ("__init__", "forward") and used is not None and origin in used.co_names:
                raise Unreadable(f"{name} of {_name(module)} uses it too")
    return _follow(module, _Reader(function, calls[0]).uses())


def parameter_readers(module: nn.Module, argument: int | str) -> list[Place]:
    """The 8-bit linear layers that read one argument of a module's forward.

    raises   Unreadable unless these are all that do
    """
    return _follow(module, parameter_uses(module, argument))


def parameter_uses(module: nn.Module, argument: int | str) -> list[Use]:
    """The calls of submodules that one argument of a module's forward is given to, in the order of the source.

    raises   Unreadable if it is read in another way, but for its shape and the like
    """
    function = forward_of(module)
    names = [argument.arg for argument in function.args.args[1:]]
    if isinstance(argument, int):
        argument = names[argument] if argument < len(names) else f"argument {argument}"
    if argument not in names + [keyword.arg for keyword in function.args.kwonlyargs]:
        raise Unreadable(f"{_name(module)} has no parameter {argument}")
    return _Reader(function, argument).uses()


def parameters_of(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's forward, but self.

    raises   Unreadable as forward_of does
    """
    arguments = forward_of(module).args
    return [argument.arg for argument in [*arguments.args[1:], *arguments.kwonlyargs]]


def _follow(module: nn.Module, uses: list[Use]) -> list[Place]:
    out: list[Place] = []
    for use in uses:
        *path, name = use.path.split(".")
        try:
            parent = module.get_submodule(".".join(path))
            target = getattr(parent, name)
        except AttributeError:
            target = use
        if target is None:
            continue  # a branch that this module does not take
        if not isinstance(target, nn.Module):
            raise Unreadable(f"{_name(module)} gives it to {use.path}, which is no module")
        if isinstance(target, ScaledLayer):
            out.append(Place(parent, name))
        elif type(target).__module__.startswith("torch.nn."):
            raise Unreadable(f"{use.path} is a {type(target).__name__} that is not 8-bit")
        else:
            out += parameter_readers(target, use.argument)
    return out


def statements(module: nn.Module) -> list[ast.stmt]:
    """The statements of the forward of a module's class, its only argument called x, without docstring.

    raises   Unreadable as forward_of does, and if there are other arguments
    """
    function = forward_of(module)
    arguments = function.args
    if len(arguments.args) != 2 or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        raise Unreadable(f"{_name(module)} takes more than one argument")
    renamed = _Rename(arguments.args[1].arg).visit(ast.parse(ast.unparse(function))).body[0].body
    is_docstring = isinstance(renamed[0], ast.Expr) and isinstance(renamed[0].value, ast.Constant)
    return list(renamed[1:] if is_docstring else renamed)


def text_of(module: nn.Module) -> str:
    """The same as text in one way of writing; "" where it is not to be read."""
    try:
        return "\n".join(map(ast.unparse, statements(module)))
    except Unreadable:
        return ""


def global_of(module: nn.Module, name: str) -> Any:
    """What a name means in the file where the forward of a module's class is written, or None."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {}).get(name)


def chain(module: nn.Module) -> list[str]:
    """The names of the submodules that a forward calls one after the other on its argument; [] if it does more."""
    try:
        body = statements(module)
    except Unreadable:
        return []
    variable = "x"
    names: list[str] = []
    for number, statement in enumerate(body):
        is_last = number == len(body) - 1
        if not isinstance(statement, ast.Return if is_last else ast.Assign) or statement.value is None:
            return []
        value: ast.expr = statement.value
        called: list[str] = []
        while isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
            called.insert(0, _path(value.func) or "")
            value = value.args[0]
        if not isinstance(value, ast.Name) or value.id != variable:
            return []
        if any(module._modules.get(name) is None for name in called):
            return []
        names += called
        if isinstance(statement, ast.Assign):
            if len(statement.targets) != 1 or not isinstance(statement.targets[0], ast.Name):
                return []
            variable = statement.targets[0].id
    return names


class _Rename(ast.NodeTransformer):
    """A parameter under the name x."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("x", node.ctx) if node.id == self.name else node


class _Reader:
    """Follows one value through a function: a parameter, or the result of one call."""

    def __init__(self, function: ast.FunctionDef, value: ast.Call | str) -> None:
        self.function = function
        self.origin = None if isinstance(value, str) else value
        self.name = value if isinstance(value, str) else ""  # the variable that holds the value while it is live
        self.parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        self.found: list[Use] = []

    def uses(self) -> list[Use]:
        self.walk(self.function.body, live=self.origin is None)
        return self.found

    def walk(self, statements: list[ast.stmt], *, live: bool) -> bool:
        """Read statements in order; returns whether the variable may still hold the value after them."""
        for statement in statements:
            if isinstance(statement, OPAQUE):
                if self.mentions(statement, live=live):
                    raise self.refusal(statement)
            elif isinstance(statement, ast.If):
                self.read(statement.test, live=live)
                after = [self.walk(branch, live=live) for branch in (statement.body, statement.orelse)]
                live = any(after)
            elif isinstance(statement, ast.With):
                for item in statement.items:
                    self.read(item, live=live)
                live = self.walk(statement.body, live=live)
            else:
                live = self.simple(statement, live=live)
                if isinstance(statement, ast.Return | ast.Raise):
                    return False
        return live

    def simple(self, statement: ast.stmt, *, live: bool) -> bool:
        self.read(statement, live=live)
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store | ast.Del) and not self.is_nested(node)}
        if live and self.name in bound and isinstance(statement, ast.AugAssign):
            raise self.refusal(statement)
        if self.origin is not None and any(node is self.origin for node in ast.walk(statement)):
            target = self.target(statement)
            if target is None:
                return live and self.name not in bound
            if live and target != self.name:
                raise self.refusal(statement)  # two variables hold it
            self.name = target
            return True
        return live and self.name not in bound

    def target(self, statement: ast.stmt) -> str | None:
        """The variable that the origin's result is assigned to; None where the statement uses it up."""
        assert self.origin is not None
        parent = self.parents[self.origin]
        if parent is statement and isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if len(targets) == 1 and isinstance(targets[0], ast.Name):
                return targets[0].id
            raise self.refusal(statement)
        self.take(self.origin)
        return None

    def read(self, node: ast.AST, *, live: bool) -> None:
        if live:
            for name in self.loads(node):
                self.take(name)

    def loads(self, node: ast.AST) -> Iterator[ast.Name]:
        """The places where the variable is read, in the order of the source."""
        names = [child for child in ast.walk(node) if isinstance(child, ast.Name) and child.id == self.name]
        yield from sorted(
            (name for name in names if isinstance(name.ctx, ast.Load)), key=lambda name: (name.lineno, name.col_offset)
        )

    def mentions(self, node: ast.AST, *, live: bool) -> bool:
        inside = any(child is self.origin for child in ast.walk(node))
        return inside or (live and any(isinstance(c, ast.Name) and c.id == self.name for c in ast.walk(node)))

    def take(self, node: ast.expr) -> None:
        """One place where the value is read: harmless, an argument of self.<path>(…), or unreadable."""
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute) and parent.attr in HARMLESS:
            return
        argument: int | str | None = None
        if isinstance(parent, ast.keyword) and parent.arg is not None:
            argument, parent = parent.arg, self.parents[parent]
        elif isinstance(parent, ast.Call) and node in parent.args:
            argument = parent.args.index(node)
            if any(isinstance(other, ast.Starred) for other in parent.args[:argument]):
                argument = None
        path = _path(parent.func) if isinstance(parent, ast.Call) else None
        if argument is None or path is None or self.is_nested(node):
            raise self.refusal(node)
        self.found.append(Use(path, argument))

    def is_nested(self, node: ast.AST) -> bool:
        while node is not self.function:
            if isinstance(node, NESTED):
                return True
            node = self.parents[node]
        return False

    def refusal(self, node: ast.AST) -> Unreadable:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        said = ast.unparse(node).splitlines()[0]
        return Unreadable(f"it is read in another way too: {said if len(said) <= 80 else said[:77] + '…'}")


def _path(node: ast.AST) -> str | None:
    """ "a.b" of the expression self.a.b; None for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if parts and isinstance(node, ast.Name) and node.id == "self" else None


def _name(module: nn.Module) -> str:
    return module.fp8_original.__name__ if isinstance(module, Producer) else type(module).__name__
