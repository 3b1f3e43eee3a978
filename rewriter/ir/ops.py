"""The pointwise operations and monoids of the language: one row each, with what torch calls them.

To add an op: a row here (its meaning), a row in `lift/pointwise.py` (the ATen name), a row in `emit/expr.py` (its
Triton text).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Op:
    """`torch` evaluates it; `infix` prints it; `kind` is 'float', 'int', 'bool' or 'same' (as its arguments)."""

    torch: Callable
    kind: str = "same"
    infix: str = ""


OPS: dict[str, Op] = {
    "add": Op(torch.add, infix="+"),
    "sub": Op(torch.sub, infix="-"),
    "mul": Op(torch.mul, infix="*"),
    "div": Op(torch.true_divide, "float", "/"),
    "floordiv": Op(lambda a, b: torch.div(a, b, rounding_mode="floor"), infix="//"),
    "truncdiv": Op(lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    "mod": Op(torch.remainder, infix="%"),
    "fmod": Op(torch.fmod),
    "pow": Op(torch.pow, infix="**"),
    "neg": Op(torch.neg),
    "abs": Op(torch.abs),
    "sign": Op(torch.sign),
    "maximum": Op(torch.maximum),
    "minimum": Op(torch.minimum),
    "exp": Op(torch.exp, "float"),
    "exp2": Op(torch.exp2, "float"),
    "log": Op(torch.log, "float"),
    "log2": Op(torch.log2, "float"),
    "log1p": Op(torch.log1p, "float"),
    "expm1": Op(torch.expm1, "float"),
    "sqrt": Op(torch.sqrt, "float"),
    "rsqrt": Op(torch.rsqrt, "float"),
    "sin": Op(torch.sin, "float"),
    "cos": Op(torch.cos, "float"),
    "tanh": Op(torch.tanh, "float"),
    "sigmoid": Op(torch.sigmoid, "float"),
    "erf": Op(torch.erf, "float"),
    "floor": Op(torch.floor),
    "ceil": Op(torch.ceil),
    "round": Op(torch.round),
    "isinf": Op(torch.isinf, "bool"),
    "isnan": Op(torch.isnan, "bool"),
    "eq": Op(torch.eq, "bool", "=="),
    "ne": Op(torch.ne, "bool", "!="),
    "lt": Op(torch.lt, "bool", "<"),
    "le": Op(torch.le, "bool", "<="),
    "gt": Op(torch.gt, "bool", ">"),
    "ge": Op(torch.ge, "bool", ">="),
    "and": Op(torch.logical_and, "bool", "&"),
    "or": Op(torch.logical_or, "bool", "|"),
    "xor": Op(torch.logical_xor, "bool", "^"),
    "bitand": Op(torch.bitwise_and, infix="&"),
    "bitor": Op(torch.bitwise_or, infix="|"),
    "bitxor": Op(torch.bitwise_xor, infix="^"),
    "not": Op(torch.logical_not, "bool"),
    "cast": Op(lambda a: a),
    "round16": Op(lambda a: a.to(torch.float16).to(a.dtype)),
    "least": Op(lambda a: a),  # over a tile of what it depends on, of which here is one position
    "greatest": Op(lambda a: a),
}


@dataclass(frozen=True)
class Monoid:
    """⊕ with its neutral element. `torch` reduces one dimension of a tensor."""

    combine: str
    neutral: float | bool
    torch: Callable


MONOIDS: dict[str, Monoid] = {
    "sum": Monoid("add", 0, lambda x, dim: x.sum(dim)),
    "max": Monoid("maximum", -math.inf, lambda x, dim: x.amax(dim)),
    "min": Monoid("minimum", math.inf, lambda x, dim: x.amin(dim)),
    "prod": Monoid("mul", 1, lambda x, dim: x.prod(dim)),
    "any": Monoid("or", False, lambda x, dim: x.any(dim)),
    "all": Monoid("and", True, lambda x, dim: x.all(dim)),
}


def neutral_of(op: str, dtype: torch.dtype) -> int | float | bool:
    """The neutral element of ⊕ in a type: integers have no infinity."""
    neutral = MONOIDS[op].neutral
    if op not in ("max", "min") or dtype.is_floating_point:
        return neutral
    limits = torch.iinfo(dtype)
    return limits.min if op == "max" else limits.max
