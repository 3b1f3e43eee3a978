"""Tensors that mask what they are added to, told by the numbers they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake


def mark_masks(held: Iterable[tuple[fx.Node, torch.Tensor]]) -> None:
    """Says of placeholders by which number their tensors mask, as `masks` of their meta. A call may bring others: such
    a number tells where looking for masked tiles pays, and is compared with.
    """
    for node, tensor in held:
        node.meta["masks"] = masking_number(tensor)


def masking_number(tensor: torch.Tensor) -> float | None:
    """-inf, or the lowest number of the dtype, whichever it holds; None where it holds neither."""
    is_plain = tensor.layout is torch.strided and tensor.device.type != "meta" and not is_fake(tensor)
    if not (is_plain and tensor.dtype.is_floating_point):
        return None
    numbers = (-math.inf, torch.finfo(tensor.dtype).min)
    return next((number for number in numbers if bool((tensor == number).any())), None)
