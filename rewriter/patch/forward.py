"""The body of the patched forward: the user's graph as PyTorch, with each fused chain as one call."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rewriter.emit import KernelFile
from rewriter.emit.torch_text import TorchPrinter, Variables
from rewriter.errors import Reason, RewriteError
from rewriter.ir import Param
from rewriter.lift.region import site_of
from rewriter.patch.literal import Text, is_plain, literal
from rewriter.patch.scope import name_in, scope_of
from rewriter.patch.sizes import Sizes
from rewriter.patch.units import Unit, units_of
from rewriter.trace import TracedModule
from rewriter.trace.sizes import UnknownSize
from rewriter.trace.source import statement_at, statement_key, user_names


@dataclass(frozen=True)
class Forward:
    """`lines` end in the return statement; `called` are the submodules, by path, that they call as they are.

    `classes` are those of the user's that it returns: how the lines name them, and what the user's file calls them.
    """

    lines: tuple[str, ...]
    called: frozenset[str]
    classes: dict[str, str]


class ForwardPrinter:
    """Prints a traced module with its chains replaced by kernel calls."""

    def __init__(
        self,
        traced: TracedModule,
        kernels: list[KernelFile],
        regions,
        leaf_text: dict[str, str],
        sizes: Sizes,
    ):
        self.traced = traced
        self.units = units_of(traced, regions)
        self.kernels = dict(zip((r.program.name for r in regions), kernels))
        self.user_names = user_names(traced.graph)
        self.variables = Variables({"self", "torch", "math", *(k.name for k in kernels), *_roots(leaf_text)})
        self.sizes: dict[Param, str] = {}
        self.sources = sizes.sources
        self.lines: list[str] = []
        self.called: set[str] = set()
        self.classes: dict[str, str] = {}
        self.done: set[Unit] = set()
        self.busy: set[Unit] = set()
        first = next((t for t in leaf_text.values()), "self")
        self.printer = TorchPrinter(self._name, self._size, f"{first}.device")
        for name, text in leaf_text.items():
            self.variables.adopt(traced.placeholders[name], text)
        self.expanded = [line for name, text in leaf_text.items() for line in self._expanded(name, text, sizes)]
        for name, attribute in traced.attributes.items():
            self.variables.adopt(traced.placeholders[name], attribute_path(attribute.path))

    def print(self) -> Forward:
        output = next(n for n in self.traced.graph.nodes if n.op == "output")
        for node in output.all_input_nodes:
            self._need(node)
        result, assigned = self._results(output)
        paths = map(attribute_path, self.traced.assigned)
        self.lines += [f"{path} = {self._container(value)}" for path, value in zip(paths, assigned)]
        sizes = [f"{name} = {self.sources[p]}" for p, name in self.sizes.items()]
        lines = (*sizes, *self.expanded, *self.lines, f"return {self._container(result)}")
        return Forward(lines, frozenset(self.called), self.classes)

    def _expanded(self, name: str, text: str, sizes: Sizes) -> list[str]:
        """An argument with dimensions that may be 1, expanded to what the kernels take."""
        places = [p for p in sizes.places if p.leaf == text]
        node = self.traced.placeholders[name]
        if not node.users or not any(p.broadcasts for p in places):
            return []
        shape = [self.printer.size_node(p.extent) if p.broadcasts else "-1" for p in places]
        variable = text if text.isidentifier() else self.variables.assign(node, name)
        self.variables.adopt(node, variable)
        return [f"{variable} = {text}.expand({', '.join(shape)})"]

    def _size(self, param: Param) -> str:
        if param not in self.sizes:
            if param not in self.sources:
                raise RewriteError(f"a size ({param.name}) that no input has")
            wanted = "batch" if ".shape[0]" in self.sources[param] else "length"
            name, k = wanted, 2
            while name in self.variables.taken:
                name, k = f"{wanted}_{k}", k + 1
            self.variables.taken.add(name)
            self.sizes[param] = name
        return self.sizes[param]

    def _name(self, node: fx.Node) -> str:
        if node in self.variables.names:
            return self.variables.of(node)
        if "constant" in node.meta:
            return self.printer.constant(node.meta["constant"])
        if node.op == "get_attr":
            raise RewriteError(
                f"{next(iter(node.users)).target} takes parts of the program, which cannot be written down"
            )
        unit = self.units[node]
        text = self._expression(unit)
        return text if self._binds_tightly(unit) else f"({text})"

    def _binds_tightly(self, unit: Unit) -> bool:
        if unit.region or unit.module:
            return True
        return not self.printer.is_infix(unit.outputs[0])

    def _need(self, node: fx.Node) -> None:
        """Writes what a value needs, then the value, unless it is part of its only reader's statement."""
        if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return
        unit = self.units[node]
        if unit in self.done:
            return
        if unit in self.busy:
            raise RewriteError("a chain that needs a value computed from its own result")
        self.busy.add(unit)
        for source in unit.inputs:
            self._need(source)
        self.busy.discard(unit)
        self.done.add(unit)
        if not self._is_inline(unit):
            self._assign(unit)

    def _is_inline(self, unit: Unit) -> bool:
        """Part of the reader's line: one reader, in the same statement of the user's."""
        if unit.region or len(unit.outputs) != 1:
            return False
        (node,) = unit.outputs
        readers = [u for u in node.users if u.op == "output" or u in self.units]
        if len(readers) != 1 or readers[0].op == "output" or self.units[readers[0]].region:
            return False
        if unit.module and self.units[readers[0]].module == "":
            return statement_key(node, outside=unit.module) == statement_key(readers[0])
        return statement_key(node) is not None and statement_key(node) == statement_key(readers[0])

    def _assign(self, unit: Unit) -> None:
        text = self._expression(unit)
        names = [self.variables.assign(n, self._wanted(n, unit)) for n in unit.outputs]
        self.lines.append(f"{', '.join(names)} = {text}")

    def _wanted(self, node: fx.Node, unit: Unit) -> str:
        """The user's name; of what a submodule returns, that of the line which calls it."""
        called = statement_key(node, outside=unit.module) if unit.module else None
        targets = statement_at(*called[:2])[2] if called else ()
        return targets[0] if len(targets) == 1 and targets[0] else self.user_names.get(node, node.name)

    def _expression(self, unit: Unit) -> str:
        """Raises RewriteError at the user's line."""
        try:
            return self._text(unit)
        except (RewriteError, UnknownSize) as error:
            reason = getattr(error, "reason", Reason(str(error)))
            raise RewriteError(reason.text, site=reason.site or site_of(unit.outputs[0])) from error

    def _text(self, unit: Unit) -> str:
        if unit.region:
            kernel = self.kernels[unit.region.program.name]
            by_name = {n.name: n for n in unit.region.inputs}
            arguments = [self._name(by_name[t.name]) for t in kernel.tensors] + [self._size(p) for p in kernel.sizes]
            return f"{kernel.name}({', '.join(arguments)})"
        if unit.module:
            self.called.add(unit.module)
            return f"{attribute_path(unit.module)}({self._name(unit.inputs[0])})"
        return self.printer.call(unit.outputs[0])

    def _results(self, output: fx.Node) -> tuple:
        """(what forward returns, [what it assigned]) with source text for leaves."""
        leaves = [Text(self.printer.value(v)) for v in pytree.tree_leaves(output.args[0])]
        return pytree.tree_unflatten(leaves, self.traced.out_spec)

    def _container(self, value: Any) -> str:
        """What forward returns, its tensors being texts. Raises RewriteError for classes that can't be written."""
        if is_plain(value) or isinstance(value, Text):
            return literal(value)
        if type(value) is dict:
            return "{" + ", ".join(f"{name!r}: {self._container(v)}" for name, v in value.items()) + "}"
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            inner = ", ".join(map(self._container, value))
            text = f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
            kind = type(value)
            return text if kind in (list, tuple) else f"{kind.__module__}.{kind.__name__}({text})"
        items = ", ".join(f"{name}={self._container(item)}" for name, item in _fields(value).items())
        return f"{self._class(type(value))}({items})"

    def _class(self, kind: type) -> str:
        scope = scope_of(self.traced.module)
        name = name_in(scope, kind)
        if not name:
            raise RewriteError(f"forward returns a {kind.__qualname__}, which its file has no name for")
        alias = f"{kind.__name__}" if not isinstance(self.traced.module, nn.Module) else f"self._{kind.__name__}"
        self.classes[alias] = name
        return alias


def _fields(value: Any) -> dict[str, Any]:
    """The parts of a named tuple, a dataclass or a sort of dict. Raises RewriteError for anything else."""
    if isinstance(value, dict):
        return dict(value)
    names = getattr(value, "_fields", None)
    if names is None and dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    if names is None:
        raise RewriteError(f"forward returns a {type(value).__name__}, which can't be written down")
    return {name: getattr(value, name) for name in names}


def _roots(leaf_text: dict[str, str]) -> set[str]:
    return {re.match(r"\w+", t)[0] for t in leaf_text.values()}


def attribute_path(path: str) -> str:
    """`layers.0.attn` → `self.layers[0].attn`"""
    return "self" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path.split("."))
