"""The chain in eager PyTorch, printed from the user's own graph: the CPU path, and what the kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.emit.names import Names
from rewriter.emit.torch_text import TorchPrinter, Variables
from rewriter.ir import Param
from rewriter.lift import Region


@dataclass(frozen=True)
class Reference:
    """`lines` of the body and the names it returns."""

    lines: tuple[str, ...]
    returns: tuple[str, ...]


def reference_of(region: Region, names: Names, known_sizes: dict[Param, str]) -> Reference:
    variables = Variables({*names.tensors.values(), *names.sizes.values(), "torch"})
    for tensor, name in names.tensors.items():
        variables.adopt(_node(region, tensor.name), name)
    first = next(iter(names.tensors.values()))
    printer = TorchPrinter(variables.of, lambda p: _size(names, known_sizes, p), f"{first}.device")
    lines = [_line(node, printer, variables, region) for node in ordered(region)]
    return Reference(tuple(lines), tuple(variables.of(o) for o in region.outputs))


def _size(names: Names, known: dict[Param, str], param: Param) -> str:
    return names.sizes.get(param) or known[param]


def _node(region: Region, name: str) -> fx.Node:
    return next(n for n in region.inputs if n.name == name)


def ordered(region: Region) -> list[fx.Node]:
    """The region's calls in graph order."""
    graph = region.outputs[0].graph
    return [n for n in graph.nodes if n in region.inside]


def _line(node: fx.Node, printer: TorchPrinter, variables: Variables, region: Region) -> str:
    text = printer.call(node)
    return f"{variables.assign(node, region.display.get(node.name, node.name))} = {text}"
