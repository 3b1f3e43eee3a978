"""Calls that tracing would refuse or fix to a size, traced as what they mean.

A program that calls them decides nothing here: a guard that their stand-ins cause is one of the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch

_arange = torch.arange
_getitem = torch.Tensor.__getitem__
_attention = torch.nn.functional.scaled_dot_product_attention
_fill_diagonal_ = torch.Tensor.fill_diagonal_


@contextmanager
def spelled() -> Iterator[None]:
    """While active, the calls are what they mean. Functions are replaced: argument parsing comes before any tracing hook."""
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.fill_diagonal_ = fill_diagonal_
    torch.Tensor.__getitem__ = getitem
    torch.arange = arange
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _attention
        del torch.Tensor.fill_diagonal_
        torch.Tensor.__getitem__ = _getitem
        torch.arange = _arange


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: Any = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other."""
    return _attention(query, key, value, attn_mask, dropout_p, bool(is_causal), **kwargs)


def fill_diagonal_(x: torch.Tensor, fill_value: Any, wrap: bool = False) -> torch.Tensor:
    """where(i == j, fill_value, x): the op itself reads the sizes as numbers."""
    if wrap or x.dim() != 2:
        return _fill_diagonal_(x, fill_value, wrap)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return x.masked_fill_(rows[:, None] == columns, fill_value)


def arange(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    """arange(n - 1, -n, -1.0): whole numbers as floats. Their count is one of whole numbers, where the op itself rounds a float."""
    symbolic = any(isinstance(a, torch.SymInt) for a in args)
    whole = all(isinstance(a, (int, torch.SymInt)) or (isinstance(a, float) and a.is_integer()) for a in args)
    if symbolic and whole and any(isinstance(a, float) for a in args):
        args, dtype = tuple(int(a) if isinstance(a, float) else a for a in args), dtype or torch.get_default_dtype()
    return _arange(*args, dtype=dtype, **kwargs)


def getitem(x: torch.Tensor, at: Any) -> torch.Tensor:
    """x[..., a:b] where 0 <= a <= b <= size whatever the sizes are: the op itself compares them as they stand, and where that
    tells nothing the length is unknown from there on."""
    entries = list(at) if isinstance(at, tuple) else [at]
    if not any(isinstance(bound, torch.SymInt) for e in entries if isinstance(e, slice) for bound in (e.start, e.stop)):
        return _getitem(x, at)
    for k, dim in _dimensions(entries, x.dim()).items():
        start, stop = entries[k].start or 0, x.shape[dim] if entries[k].stop is None else entries[k].stop
        if entries[k] != slice(None) and entries[k].step in (None, 1) and all(map(_is_nonnegative, (start, stop - start, x.shape[dim] - stop))):
            x, entries[k] = x.narrow(dim, start, stop - start), slice(None)
    return _getitem(x, tuple(entries))


def _dimensions(entries: list, rank: int) -> dict[int, int]:
    """The dimension of each slice; of none where an entry takes several."""
    if not all(e is None or e is Ellipsis or isinstance(e, (slice, int)) for e in entries):
        return {}
    taken = sum(isinstance(e, (slice, int)) for e in entries)
    out, dim = {}, 0
    for k, entry in enumerate(entries):
        if isinstance(entry, slice):
            out[k] = dim
        dim += rank - taken if entry is Ellipsis else entry is not None
    return out


def _is_nonnegative(number: int | torch.SymInt) -> bool:
    """Whether a number is at least 0 at all sizes."""
    if isinstance(number, int):
        return number >= 0
    return any(form(number.node.expr).is_nonnegative for form in (sympy.expand, sympy.factor))
