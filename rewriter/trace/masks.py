"""Tensors that mask what they are added to, told by the numbers they hold."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake

from rewriter.trace.calls import VIEWS, call_name


def mark_masks(graph: fx.Graph, given: dict[str, torch.Tensor]) -> None:
    """Says of placeholders, by their names, and of views and casts of them by which number they mask, as `masks` of their
    meta. A call may bring others: such a number tells where looking for masked tiles pays, and is compared with.
    """
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in given:
            node.meta["masks"] = masking_number(given[node.name])
        elif node.op == "call_function" and call_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
            node.meta["masks"] = _seen_as(node.args[0].meta.get("masks"), node.meta.get("val"))


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
