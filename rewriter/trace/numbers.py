"""Functions of numbers that stay symbolic where the number is made from sizes: built in, each would ask for its value.

len(x), float(n), math.log(n) → what torch calls a symbolic number
"""

from __future__ import annotations

import ast
import builtins
import linecache
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

LOG2E = math.log2(math.e)
_len, _log, _pow, _max, _min = builtins.len, math.log, math.pow, builtins.max, builtins.min


def is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def length(x: Any) -> int | torch.SymInt:
    """len(x)"""
    return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else _len(x)


def number(*value: Any) -> float | torch.SymFloat:
    """float(n)"""
    return torch.sym_float(value[0]) if value and is_symbolic(value[0]) else float(*value)


def largest(*values: Any, **kwargs: Any) -> Any:
    """max(1.0, x); torch has its own for two sizes, and asks which of other numbers is larger."""
    return reduce(torch.sym_max, values) if _are_numbers(values) else _max(*values, **kwargs)


def smallest(*values: Any, **kwargs: Any) -> Any:
    """min(1.0, x), likewise"""
    return reduce(torch.sym_min, values) if _are_numbers(values) else _min(*values, **kwargs)


def _are_numbers(values: tuple) -> bool:
    return any(map(is_symbolic, values)) and all(is_symbolic(v) or isinstance(v, (int, float)) for v in values)


def log(x: Any, *base: Any) -> float | torch.SymFloat:
    """log(n), log(n, base); torch has symbols for log2 alone."""
    if not any(map(is_symbolic, (x, *base))):
        return _log(x, *base)
    return log(x) / log(*base) if base else torch._sym_log2(x) / LOG2E


def power(x: Any, y: Any) -> float | torch.SymFloat:
    """pow(x, y)"""
    return number(x) ** number(y) if is_symbolic(x) or is_symbolic(y) else _pow(x, y)


def _for_symbols(name: str, symbolic: Callable) -> Callable:
    original = getattr(math, name)
    return lambda x: symbolic(x) if is_symbolic(x) else original(x)


OF_BUILTINS = {"len": length, "max": largest, "min": smallest}
OF_MATH = {name: _for_symbols(name, getattr(torch, f"_sym_{name}")) for name in ("sqrt", "sin", "cos", "tanh", "log2")}
OF_MATH |= {
    "log": log,
    "pow": power,
    "exp": _for_symbols("exp", lambda x: math.e ** torch.sym_float(x)),
    "log10": _for_symbols("log10", lambda x: log(x, 10)),
    "log1p": _for_symbols("log1p", lambda x: log(x + 1)),
}


def only_calls(file: str, name: str) -> bool:
    """Whether a file has a name for nothing but calls of it, and annotations: `float(n)`, no `x.to(float)`."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return False
    allowed = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    notes = (getattr(n, field, None) for n in ast.walk(tree) for field in ("annotation", "returns"))
    allowed += [inner for note in notes if note for inner in ast.walk(note)]
    used = {id(n) for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name}
    return bool(used) and used <= set(map(id, allowed))
