"""Sizes and shapes as Python text."""

from __future__ import annotations

from rewriter.emit.names import Names, size_text
from rewriter.ir import Tensor


def tuple_text(items: list[str]) -> str:
    return f"({', '.join(items)}{',' * (len(items) == 1)})"


def kept(tensor: Tensor, names: Names, beside: str) -> dict[str, str]:
    """A tensor that one kernel writes for another, on the device of that `beside`."""
    shape = tuple_text([size_text(e, names) for e in tensor.shape])
    made = f"torch.empty({shape}, device={beside}.device, dtype={tensor.dtype})"
    return {"name": names.tensors[tensor], "made": made}
