"""Calls for every name a lifting rule is registered under: `CASES[name]()` gives them with fresh tensors.

Sizes are distinct where they may differ, so that dynamic shapes tell one symbol from the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.lifting import Call, call

aten = torch.ops.aten
INF, NAN = math.inf, math.nan


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def p(*shape: int) -> torch.Tensor:
    """Positive numbers."""
    return torch.rand(shape) + 0.1


def i(*shape: int, least: int = -7, most: int = 7) -> torch.Tensor:
    return torch.randint(least, most, shape)


def b(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.6


def odd(*shape: int) -> torch.Tensor:
    """Numbers with NaN, infinities and zeros among them."""
    x = torch.randn(shape).flatten()
    x[:4] = torch.tensor([NAN, INF, -INF, 0.0])
    return x.reshape(shape)


Calls = Callable[[], list[Call]]
CASES: dict[str, Calls] = {}


def unary(names: str, make: Callable = f) -> None:
    for name in names.split():
        CASES[name] = lambda name=name: [call(getattr(aten, name).default, make(3, 5))]


unary("neg abs exp exp2 expm1 sin cos tanh sigmoid erf floor ceil relu silu square contiguous clone detach alias")
unary("log log2 log1p sqrt rsqrt reciprocal", p)
unary("isinf isnan", odd)
unary("lift_fresh_copy numpy_T t mT mH matrix_H adjoint")
CASES["sign"] = lambda: [
    call(aten.sign.default, odd(3, 5).nan_to_num()),
    call(aten.sign.default, i(3, 5)),
]
CASES["exp"] = lambda: [call(aten.exp.default, f(3, 5)), call(aten.exp.default, i(3, 5))]
CASES["neg"] = lambda: [call(aten.neg.default, f(3, 5)), call(aten.neg.default, i(3, 5))]


def binary(names: str, left: Callable, right: Callable, scalar=None) -> None:
    """Tensors that broadcast, and a tensor with a number."""
    for name in names.split():
        packet = getattr(aten, name)
        overload = packet.Tensor if hasattr(packet, "Tensor") else packet.default
        calls = [
            (overload, lambda: (left(3, 5), right(5))),
            (overload, lambda: (left(2, 1, 5), right(3, 1))),
        ]
        if scalar is not None and hasattr(packet, "Scalar"):
            calls.append((packet.Scalar, lambda: (left(3, 5), scalar)))
        CASES[name] = lambda calls=calls: [call(op, *make()) for op, make in calls]


binary("add sub mul div subtract divide true_divide", f, f, 1.5)
binary("maximum minimum", f, f)
binary("eq ne lt le gt ge", i, i, 2)
binary("logical_and logical_or logical_xor", b, b)
binary("__and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor", b, b)
binary("remainder floor_divide", f, p, 0.7)


def more(name: str, make: Calls) -> None:
    """Further calls for a name."""
    before = CASES.get(name, list)
    CASES[name] = lambda: [*before(), *make()]


more(
    "add",
    lambda: [
        call(aten.add.Tensor, f(3, 5), f(3, 5), alpha=2.5),
        call(aten.add.Tensor, i(3, 5), i(5), alpha=3),
    ],
)
more("add", lambda: [call(aten.add.Tensor, i(3, 5), f(5)), call(aten.add.Scalar, i(3, 5), 2)])
more(
    "sub",
    lambda: [call(aten.sub.Tensor, f(3, 5), f(5), alpha=2), call(aten.sub.Tensor, i(3, 1), i(5))],
)
more("mul", lambda: [call(aten.mul.Tensor, f(3, 5), b(3, 5)), call(aten.mul.Tensor, i(3, 5), 2.5)])
more(
    "mul",
    lambda: [
        call(aten.mul.Tensor, f(3, 5).half(), f(3, 5).half()),
        call(aten.mul.Tensor, f(3, 5).half(), f(3, 5)),
    ],
)
more("eq", lambda: [call(aten.eq.Tensor, odd(3, 5), f(3, 5)), call(aten.eq.Scalar, odd(3, 5), -INF)])
more("lt", lambda: [call(aten.lt.Tensor, i(3, 5), f(5)), call(aten.lt.Scalar, i(3, 5), 1.5)])
for mode in (None, "floor", "trunc"):
    more("div", lambda mode=mode: [call(aten.div.Tensor_mode, f(3, 5), p(5), rounding_mode=mode)])
    more(
        "div",
        lambda mode=mode: [call(aten.div.Tensor_mode, i(3, 5), i(5, least=1), rounding_mode=mode)],
    )
    more("div", lambda mode=mode: [call(aten.div.Scalar_mode, i(3, 5), 3, rounding_mode=mode)])
more(
    "remainder",
    lambda: [
        call(aten.remainder.Tensor, i(3, 5), i(5, least=1)),
        call(aten.remainder.Scalar, i(3, 5), 3),
    ],
)
more("remainder", lambda: [call(aten.remainder.Scalar, i(3, 5), -3)])
more(
    "floor_divide",
    lambda: [
        call(aten.floor_divide.default, i(3, 5), i(5, least=1)),
        call(aten.floor_divide.Scalar, i(3, 5), 3),
    ],
)
CASES["pow"] = lambda: [
    call(aten.pow.Tensor_Scalar, f(3, 5), 2),
    call(aten.pow.Tensor_Scalar, p(3, 5), 2.0),
    call(aten.pow.Tensor_Scalar, f(3, 5), 3),
    call(aten.pow.Tensor_Scalar, p(3, 5), -0.5),
    call(aten.pow.Tensor_Tensor, p(3, 5), f(5)),
    call(aten.pow.Scalar, 2, f(3, 5)),
    call(aten.pow.Scalar, 2.0, i(3, 5, least=0)),
    call(aten.pow.Tensor_Scalar, i(3, 5), 2),
]
CASES["rsub"] = lambda: [
    call(aten.rsub.Scalar, f(3, 5), 1.0),
    call(aten.rsub.Scalar, i(3, 5), 1),
    call(aten.rsub.Tensor, f(3, 5), f(5)),
]
CASES["max.other"] = lambda: [call(aten.max.other, f(3, 5), f(5))]
CASES["min.other"] = lambda: [call(aten.min.other, f(3, 5), f(5))]
CASES["gelu"] = lambda: [
    call(aten.gelu.default, f(3, 5)),
    call(aten.gelu.default, f(3, 5), approximate="tanh"),
]
CASES["leaky_relu"] = lambda: [
    call(aten.leaky_relu.default, f(3, 5)),
    call(aten.leaky_relu.default, f(3, 5), 0.3),
]
CASES["softplus"] = lambda: [
    call(aten.softplus.default, 9 * f(3, 5)),
    call(aten.softplus.default, f(3, 5), 2, 1),
]
CASES["elu"] = lambda: [call(aten.elu.default, f(3, 5)), call(aten.elu.default, f(3, 5), 0.5)]
CASES["relu"] = lambda: [call(aten.relu.default, odd(3, 5)), call(aten.relu.default, i(3, 5))]
for name in ("clamp", "clip"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.default, f(3, 5), -0.5, 0.5),
        call(op.default, f(3, 5), None, 0.5),
        call(op.default, f(3, 5), min=0.0),
        call(op.default, i(3, 5), -2, 3),
        call(op.default, f(3, 5), max=0.0),
    ]
more(
    "clamp",
    lambda: [
        call(aten.clamp.Tensor, f(3, 5), f(5), None),
        call(aten.clamp.default, odd(3, 5), 0.0),
    ],
)
CASES["clamp_min"] = lambda: [
    call(aten.clamp_min.default, f(3, 5), 0.1),
    call(aten.clamp_min.Tensor, f(3, 5), f(5)),
]
CASES["clamp_max"] = lambda: [
    call(aten.clamp_max.default, f(3, 5), 0.1),
    call(aten.clamp_max.Tensor, f(3, 5), f(5)),
]
CASES["hardtanh"] = lambda: [
    call(aten.hardtanh.default, f(3, 5)),
    call(aten.hardtanh.default, f(3, 5), -0.5, 0.2),
]
CASES["logical_not"] = lambda: [
    call(aten.logical_not.default, b(3, 5)),
    call(aten.logical_not.default, i(3, 5)),
]
CASES["bitwise_not"] = lambda: [call(aten.bitwise_not.default, b(3, 5))]
CASES["where"] = lambda: [
    call(aten.where.self, b(3, 5), f(5), f(3, 1)),
    call(aten.where.ScalarOther, b(3, 5), f(5), -INF),
    call(aten.where.ScalarSelf, b(3, 5), 0.0, f(5)),
    call(aten.where.Scalar, b(3, 5), 0.0, 1.0),
    call(aten.where.self, b(3, 5), i(3, 5), f(3, 5)),
]
CASES["masked_fill"] = lambda: [
    call(aten.masked_fill.Scalar, f(2, 3, 5), b(3, 5), -INF),
    call(aten.masked_fill.Scalar, f(3, 5), b(3, 5), 2),
    call(aten.masked_fill.Tensor, f(3, 5), b(5), torch.tensor(-1e9)),
    call(aten.masked_fill.Scalar, i(3, 5), b(3, 1), 4),
]
CASES["to"] = lambda: [
    call(aten.to.dtype, x, t)
    for x in (f(3, 5), i(3, 5), b(3, 5))
    for t in (torch.float32, torch.float16, torch.int64, torch.bool)
]
CASES["_to_copy"] = lambda: [
    call(aten._to_copy.default, f(3, 5), dtype=torch.bfloat16),
    call(aten._to_copy.default, odd(3, 5).nan_to_num(), dtype=torch.bool),
]
CASES["type_as"] = lambda: [call(aten.type_as.default, i(3, 5), f(2))]
CASES["copy"] = lambda: [
    call(aten.copy.default, f(3, 5), f(5)),
    call(aten.copy.default, f(3, 5), i(3, 5)),
]
CASES["dropout"] = lambda: [
    call(aten.dropout.default, f(3, 5), 0.5, False),
    call(aten.dropout.default, f(3, 5), 0.0, True),
]
CASES["feature_dropout"] = lambda: [call(aten.feature_dropout.default, f(3, 5), 0.5, False)]
CASES["nan_to_num"] = lambda: [
    call(aten.nan_to_num.default, odd(3, 5)),
    call(aten.nan_to_num.default, odd(3, 5), 1.0, 2.0, -3.0),
]

# Tensors from positions and constants

CASES["arange"] = lambda: [
    call(aten.arange.default, 7),
    call(aten.arange.default, 7.0),
    call(aten.arange.default, 7, dtype=torch.float32),
]
CASES["arange.start"] = lambda: [call(aten.arange.start, 2, 7), call(aten.arange.start, 0.5, 4)]
CASES["arange.start_step"] = lambda: [
    call(aten.arange.start_step, 9, 1, -2),
    call(aten.arange.start_step, 0, 3, 0.5),
    call(aten.arange.start_step, 0, 8, 2, dtype=torch.float32),
]
CASES["full"] = lambda: [
    call(aten.full.default, [3, 5], -INF),
    call(aten.full.default, [3], 2),
    call(aten.full.default, [3, 5], True),
]
CASES["full_like"] = lambda: [
    call(aten.full_like.default, f(3, 5), 2),
    call(aten.full_like.default, f(3, 5), 1.5, dtype=torch.float16),
]
CASES["new_full"] = lambda: [
    call(aten.new_full.default, f(3), [2, 5], -INF),
    call(aten.new_full.default, i(3), [2, 5], 3),
]
CASES["fill"] = lambda: [call(aten.fill.Tensor, f(3, 5), torch.tensor(2.5))]
CASES["fill.Scalar"] = lambda: [
    call(aten.fill.Scalar, f(3, 5), 2.5),
    call(aten.fill.Scalar, i(3, 5), 2),
]
CASES["scalar_tensor"] = lambda: [
    call(aten.scalar_tensor.default, 2.5),
    call(aten.scalar_tensor.default, 3, dtype=torch.int64),
]
for name in ("zeros", "ones"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.default, [3, 5]),
        call(op.default, [3, 5], dtype=torch.bool),
        call(op.default, []),
    ]
    CASES[f"{name}_like"] = lambda op=getattr(aten, f"{name}_like"): [
        call(op.default, f(3, 5)),
        call(op.default, f(3, 5), dtype=torch.int64),
    ]
    CASES[f"new_{name}"] = lambda op=getattr(aten, f"new_{name}"): [call(op.default, f(3), [2, 5])]
CASES["eye"] = lambda: [call(aten.eye.default, 4)]
CASES["eye.m"] = lambda: [call(aten.eye.m, 3, 5), call(aten.eye.m, 3, 5, dtype=torch.bool)]
for name in ("tril", "triu"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.default, make(3, 5), *k) for make in (f, b, i) for k in ((), (1,), (-2,))
    ]
    more(name, lambda op=getattr(aten, name): [call(op.default, f(2, 5, 3), 1)])
