"""Sizes and shapes as Python text."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from itertools import groupby

import torch

from rewriter.emit.names import Names, size_text
from rewriter.ir import Tensor


def tuple_text(items: list[str]) -> str:
    return f"({', '.join(items)}{',' * (len(items) == 1)})"


def strides_text(strides: dict[str, str], aligned: AbstractSet[str]) -> list[str]:
    """What the parameters for strides are passed: `a.stride(0)`; `*a.stride()[:2]` for several of them from the first on;
    those in `aligned` in units of `align`.
    """
    texts = [f"{text} // align" if stride in aligned else text for stride, text in strides.items()]
    out = []
    for _, group in groupby(texts, lambda text: text.partition(".")[0]):
        own = list(group)
        tensor = own[0].partition(".")[0]
        is_whole = len(own) > 1 and own == [f"{tensor}.stride({k})" for k in range(len(own))]
        out += [f"*{tensor}.stride()[:{len(own)}]"] if is_whole else own
    return out


def kept(tensor: Tensor, names: Names, beside: Tensor) -> dict[str, str]:
    """A tensor that one kernel writes for another, on the device of that `beside`."""
    made = allocated(beside, names, shape_text(tensor, names), tensor.dtype)
    return {"name": names.tensors[tensor], "made": made}


def shape_text(tensor: Tensor, names: Names) -> str:
    return tuple_text([size_text(e, names) for e in tensor.shape])


def allocated(beside: Tensor, names: Names, shape: str, dtype: torch.dtype) -> str:
    """What makes a tensor on the device of another, which takes less of the host than `torch.empty`."""
    return f"{names.tensors[beside]}.new_empty({shape}{'' if dtype is beside.dtype else f', dtype={dtype}'})"
