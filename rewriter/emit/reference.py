"""The chain in eager PyTorch, printed from the user's own graph: the CPU path, and what the kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from rewriter.emit.names import Names
from rewriter.emit.torch_text import TorchPrinter, Variables
from rewriter.ir import Node, Param
from rewriter.lift import Region
from rewriter.trace.calls import value_inputs


@dataclass(frozen=True)
class Reference:
    """`lines` of the body and the names it returns."""

    lines: tuple[str, ...]
    returns: tuple[str, ...]


def reference_of(region: Region, names: Names, known_sizes: dict[Node, str]) -> Reference:
    variables = Variables({*names.tensors.values(), *names.sizes.values(), "torch"})
    inputs = {n.name: n for n in region.inputs}
    given = {inputs[t.name]: name for t, name in names.tensors.items() if t.name in inputs}
    for node, name in given.items():
        variables.adopt(node, name)
    first = next(iter(given.values()))
    printer = TorchPrinter(variables.of, lambda p: _size(names, known_sizes, p), f"{first}.device")
    lines = [_line(node, printer, variables, region) for node in ordered(region)]
    return Reference(tuple(lines), tuple(variables.of(o) for o in region.outputs))


def _size(names: Names, known: dict[Node, str], param: Param) -> str:
    return names.sizes.get(param) or known.get(param, param.name)


def ordered(region: Region) -> list[fx.Node]:
    """The calls that lead from the region's inputs to its outputs, in graph order."""
    needed: set[fx.Node] = set()
    todo = list(region.outputs)
    while todo:
        node = todo.pop()
        if node.op == "call_function" and node not in needed and node not in region.inputs and not _is_size(node):
            needed.add(node)
            todo += [region.passed[node]] if node in region.passed else value_inputs(node)
    return [n for n in region.outputs[0].graph.nodes if n in needed]


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _line(node: fx.Node, printer: TorchPrinter, variables: Variables, region: Region) -> str:
    text = variables.of(region.passed[node]) if node in region.passed else printer.call(node)
    return f"{variables.assign(node, region.display.get(node.name, node.name))} = {text}"
