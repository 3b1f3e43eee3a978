"""Tensors that mask what they are added to, told by the numbers they hold."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake

from rewriter.trace.calls import FILLS, VIEWS, call_name

LARGE = 2**22  # elements: values of more are not computed to look at
MAKES = {"arange", "full", "zeros", "ones", "scalar_tensor", "eye", "tril", "triu", "cumsum", "where", "cat", "stack"}


def mark_masks(graph: fx.Graph, given: dict[str, torch.Tensor]) -> None:
    """Says of placeholders, by their names, of views and casts of them, and of what the program makes of them element by
    element, by which number they mask, as `masks` of their meta. A call may bring others: such a number tells where
    looking for masked tiles pays, and is compared with.
    """
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in given:
            node.meta["masks"] = masking_number(given[node.name])
        elif node.op == "call_function" and call_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
            node.meta["masks"] = _seen_as(node.args[0].meta.get("masks"), node.meta.get("val"))
    for node, value in _made(graph, given).items():
        node.meta["masks"] = masking_number(value)


def _made(graph: fx.Graph, given: dict[str, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """What becomes of the example where a number that masks may come from: its values, of no more than a few calls."""
    known, masking = _computable(graph, given), _masking(graph)
    wanted = {n for n in masking if n in known and n.op == "call_function"}
    needed = set(wanted)
    for node in reversed(graph.nodes):
        needed.update(node.all_input_nodes if node in needed else ())
    values: dict[fx.Node, object] = {}
    for node in (n for n in graph.nodes if n in needed):
        values[node] = given[node.name] if node.op == "placeholder" and node.name in given else _computed(node, values)
    return {n: values[n] for n in wanted if torch.is_tensor(values[n])}


def _computable(graph: fx.Graph, given: dict[str, torch.Tensor]) -> set[fx.Node]:
    """Calls that make little of little, element by element, of the example and of sizes."""
    known: set[fx.Node] = set()
    for node in graph.nodes:
        is_given = node.op == "placeholder" and (node.name in given or node.meta.get("constant") is not None)
        is_made = node.op == "call_function" and (_is_size(node) or _is_simple(node) and _is_little(node))
        if is_given or is_made and known.issuperset(node.all_input_nodes):
            known.add(node)
    return known


def _masking(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a number may come to by which they mask, and what is made of them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.meta.get("masks") is not None or _brings_number(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _brings_number(node: fx.Node) -> bool:
    constant = node.meta.get("constant")
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    numbers += [constant.item()] if constant is not None and constant.numel() == 1 else []
    return call_name(node) == "log" or any(abs(n) >= -torch.finfo(torch.float16).min for n in numbers)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _is_simple(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or call_name(node) in VIEWS | MAKES | set(FILLS)


def _is_little(node: fx.Node) -> bool:
    value = node.meta.get("val")
    count = value.numel() if torch.is_tensor(value) else LARGE
    return (count.node.hint if isinstance(count, torch.SymInt) else count) < LARGE


def _computed(node: fx.Node, values: dict[fx.Node, object]) -> object:
    """The value of a call; None where it has none, of the example as it is."""
    if node.op == "placeholder":
        return node.meta["constant"]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None


def _seen_as(number: float | None, value: object) -> float | None:
    """A number in the dtype of a value that holds it."""
    if number is None or not torch.is_tensor(value) or not value.dtype.is_floating_point:
        return None
    return torch.tensor(number).to(value.dtype).item()


def masking_number(tensor: torch.Tensor) -> float | None:
    """-inf, or the lowest number of the dtype, whichever it holds; None where it holds neither."""
    is_plain = tensor.layout is torch.strided and tensor.device.type != "meta" and not is_fake(tensor)
    if not (is_plain and tensor.dtype.is_floating_point):
        return None
    numbers = (-math.inf, torch.finfo(tensor.dtype).min)
    return next((number for number in numbers if bool((tensor == number).any())), None)
