"""Calls that tracing would refuse or fix to a size, traced as what they mean.

A program that calls them decides nothing here: a guard that their stand-ins cause is one of the user's line.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import nn
from torch.torch_version import TorchVersion

from rewriter.trace.composed import composed
from rewriter.trace.named_axes import by_named_axes
from rewriter.trace.numbers import OF_BUILTINS, OF_MATH, is_symbolic, number, only_calls
from rewriter.trace.source import is_user_file

SLICES_LOSE_LENGTHS = TorchVersion(torch.__version__) < "2.12"  # also where only the size is no number
_getitem = torch.Tensor.__getitem__
_setitem = torch.Tensor.__setitem__
_attention = torch.nn.functional.scaled_dot_product_attention
_ABSENT = object()


@contextmanager
def spelled(program: Callable) -> Iterator[None]:
    """While active, the calls are what they mean. Functions are replaced, also where the program's files import them
    by name: argument parsing comes before any tracing hook.
    """
    owners = [(vars(owner).get(name, _ABSENT), owner, name, new) for owner, name, new in _stand_ins()]
    originals = {id(getattr(owner, name)): new for _, owner, name, new in owners}
    scopes = list(_scopes(program))
    held = [(scope, name, value) for scope in scopes for name, value in scope.items() if id(value) in originals]
    called = [scope for scope in scopes if "float" not in scope and only_calls(scope.get("__file__") or "", "float")]
    for _, owner, name, new in owners:
        setattr(owner, name, new)
    for scope, name, value in held:
        scope[name] = originals[id(value)]
    for scope in called:
        scope["float"] = number
    try:
        yield
    finally:
        for scope in called:
            del scope["float"]
        for scope, name, value in held:
            scope[name] = value
        for before, owner, name, _ in owners:
            delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)


def _stand_ins() -> Iterator[tuple[Any, str, Callable]]:
    """(owner, name, what it is while tracing)"""
    yield torch.nn.functional, "scaled_dot_product_attention", attention
    yield torch.Tensor, "__getitem__", getitem
    yield torch.Tensor, "__setitem__", setitem
    yield from composed()
    yield from by_named_axes()
    yield from ((builtins, name, new) for name, new in OF_BUILTINS.items())
    yield from ((math, name, new) for name, new in OF_MATH.items())


def _scopes(program: Callable) -> Iterator[dict[str, Any]]:
    """The globals of the user's files that a program's forwards are in."""
    parts = program.modules() if isinstance(program, nn.Module) else [program]
    forwards = (getattr(kind, "forward", None) for part in parts for kind in type(part).__mro__)
    found = [getattr(inspect.unwrap(f), "__globals__", {}) for f in (program.forward, *filter(callable, forwards))]
    yield from {id(scope): scope for scope in found if is_user_file(scope.get("__file__") or "<")}.values()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other. A scale made
    from sizes is a factor.
    """
    if is_symbolic(scale):
        query, scale = query * scale, 1.0
    return _attention(query, key, value, attn_mask, dropout_p, bool(is_causal), scale=scale, **kwargs)


def getitem(x: torch.Tensor, at: Any) -> torch.Tensor:
    """x[..., a:b] with a length that is known: the op itself compares bounds and sizes as they stand, and where that
    tells nothing the length is unknown from there on. x[..., n // 2], which it would fix to a number.
    """
    return _getitem(*_narrowed(x, at))


def setitem(x: torch.Tensor, at: Any, value: Any) -> None:
    """x[..., a:b] = value, x[..., -n] = value, likewise"""
    if SLICES_LOSE_LENGTHS or any(isinstance(n, torch.SymInt) for n in (at if isinstance(at, tuple) else [at])):
        _setitem(*_narrowed(x, at), value)
        return
    torch.Tensor.__setitem__ = _setitem  # export knows the call by this name, and does without sizes
    try:
        x[at] = value
    finally:
        torch.Tensor.__setitem__ = setitem


def _narrowed(x: torch.Tensor, at: Any) -> tuple[torch.Tensor, Any]:
    """A view without what slices leave out, and what is left of the index."""
    entries = list(at) if isinstance(at, tuple) else [at]
    for k, dim in _dimensions(entries, x.dim()).items():
        size, entry = x.shape[dim], entries[k]
        if isinstance(entry, torch.SymInt):
            x, entries[k] = x.narrow(dim, _inside(entry, size), 1), 0
            continue
        numbers = (size, entry.start, entry.stop)
        if entry == slice(None) or entry.step not in (None, 1) or not any(isinstance(n, torch.SymInt) for n in numbers):
            continue
        bounds = (0 if entry.start is None else entry.start, size if entry.stop is None else entry.stop)
        start, stop = (_inside(n, size) for n in bounds)
        if not (SLICES_LOSE_LENGTHS or _is_plain(entry, start, stop)):
            continue
        length = stop - start if _is_nonnegative(stop - start) else torch.sym_max(stop - start, 0)
        x, entries[k] = x.narrow(dim, start, length), slice(None)
    return x, tuple(entries)


def _inside(bound: int | torch.SymInt, size: int | torch.SymInt) -> int | torch.SymInt:
    """A bound of a slice as a position from 0 to the size. Where its sign depends on sizes, it is what it is in the
    example: a branch of the program.
    """
    if _is_nonnegative(-bound - 1) or not (_is_nonnegative(bound) or bound >= 0):
        return size + bound if _is_nonnegative(size + bound) else torch.sym_max(size + bound, 0)
    return bound if _is_nonnegative(size - bound) else torch.sym_min(bound, size)


def _is_plain(entry: slice, start: int | torch.SymInt, stop: int | torch.SymInt) -> bool:
    """Whether bounds are what they say at all sizes, and one is no number: others the op gets right."""
    bounds = [n for n in (entry.start, entry.stop) if n is not None]
    return any(isinstance(n, torch.SymInt) for n in bounds) and all(any(n is m for m in (start, stop)) for n in bounds)


def _dimensions(entries: list, rank: int) -> dict[int, int]:
    """The dimension of each slice, and of each position made from sizes; of none where an entry takes several."""
    if not all(e is None or e is Ellipsis or isinstance(e, (slice, int, torch.SymInt)) for e in entries):
        return {}
    taken = sum(isinstance(e, (slice, int, torch.SymInt)) for e in entries)
    out, dim = {}, 0
    for k, entry in enumerate(entries):
        if isinstance(entry, (slice, torch.SymInt)):
            out[k] = dim
        dim += rank - taken if entry is Ellipsis else entry is not None
    return out


def _is_nonnegative(number: int | torch.SymInt) -> bool:
    """Whether a number is at least 0 at all sizes."""
    if isinstance(number, int):
        return number >= 0
    return any(form(number.node.expr).is_nonnegative for form in (sympy.expand, sympy.factor))
