"""The body of the patched forward: the user's graph as PyTorch, with each fused chain as one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.emit import KernelFile
from rewriter.emit.torch_text import TorchPrinter, Variables
from rewriter.errors import RewriteError
from rewriter.ir import Param
from rewriter.patch.sizes import Sizes
from rewriter.patch.literal import Text
from rewriter.patch.units import Unit, units_of
from rewriter.trace import TracedModule
from rewriter.trace.source import statement_key, user_names


@dataclass(frozen=True)
class Forward:
    """`lines` end in the return statement; `called` are the submodules, by path, that they call as they are."""

    lines: tuple[str, ...]
    called: frozenset[str]


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
        self.variables = Variables({"self", "torch", *(k.name for k in kernels), *_roots(leaf_text)})
        self.sizes: dict[Param, str] = {}
        self.sources = sizes.sources
        self.lines: list[str] = []
        self.called: set[str] = set()
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
        self.lines += [f"{path} = {value!r}" for path, value in zip(paths, assigned)]
        sizes = [f"{name} = {self.sources[p]}" for p, name in self.sizes.items()]
        lines = (*sizes, *self.expanded, *self.lines, f"return {result!r}")
        return Forward(lines, frozenset(self.called))

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
        names = [self.variables.assign(n, self._wanted(n)) for n in unit.outputs]
        self.lines.append(f"{', '.join(names)} = {text}")

    def _wanted(self, node: fx.Node) -> str:
        return self.user_names.get(node, node.name)

    def _expression(self, unit: Unit) -> str:
        if unit.region:
            kernel = self.kernels[unit.region.program.name]
            by_name = {n.name: n for n in unit.region.inputs}
            arguments = [self._name(by_name[t.name]) for t in kernel.tensors] + [
                self._size(p) for p in kernel.sizes
            ]
            return f"{kernel.name}({', '.join(arguments)})"
        if unit.module:
            self.called.add(unit.module)
            return f"{attribute_path(unit.module)}({self._name(unit.inputs[0])})"
        return self.printer.call(unit.outputs[0])

    def _results(self, output: fx.Node) -> tuple:
        """(what forward returns, [what it assigned]) with source text for leaves."""
        leaves = [Text(self.printer.value(v)) for v in pytree.tree_leaves(output.args[0])]
        return pytree.tree_unflatten(leaves, self.traced.out_spec)


def _roots(leaf_text: dict[str, str]) -> set[str]:
    import re

    return {re.match(r"\w+", t)[0] for t in leaf_text.values()}


def attribute_path(path: str) -> str:
    """`layers.0.attn` → `self.layers[0].attn`"""
    return "self" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path.split("."))
