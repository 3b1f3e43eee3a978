"""Calls for pointwise functions and activations with a name of their own: more of `CASES` in `lift_cases.py`."""

from __future__ import annotations

import torch

from tests.lift_cases import CASES, INF, NAN, aten, b, binary, f, i, more, odd, p, unary
from tests.lifting import call


def inner(*shape: int) -> torch.Tensor:
    """Numbers between -1 and 1."""
    return 1.8 * torch.rand(shape) - 0.9


def share(*shape: int) -> torch.Tensor:
    """Numbers from 0 to 1, both among them."""
    x = torch.rand(shape).flatten()
    x[:2] = torch.tensor([0.0, 1.0])
    return x.reshape(shape)


def halves(*shape: int) -> torch.Tensor:
    """Numbers half-way between whole ones, and others."""
    return torch.cat([torch.arange(-4, 4) + 0.5, 3 * torch.randn(shape).flatten()])[
        : torch.Size(shape).numel()
    ].reshape(shape)


unary("negative positive absolute tan sinh cosh trunc fix frac deg2rad rad2deg relu6 mish hardsigmoid hardswish")
unary("special_exp2 special_expm1 special_expit special_erf")
unary("special_log1p log10", p)
unary("isfinite isposinf isneginf", odd)
unary("log_sigmoid", lambda *s: 30 * f(*s))
unary("round special_round", halves)
unary("atanh arctanh", inner)
unary("sgn")
CASES["isclose"] = lambda: [
    call(aten.isclose.default, torch.tensor([1.0, 2.0, INF, INF]), torch.tensor([1.0, 2.1, INF, 3.0])),
    call(aten.isclose.default, f(3, 5), f(5), 0.1, 0.2),
]
CASES["special_entr"] = lambda: [
    call(aten.special_entr.default, share(3, 5)),
    call(aten.special_entr.default, torch.tensor([-1.0, NAN, INF, 0.5])),
]
more("sinh", lambda: [call(aten.sinh.default, torch.tensor([1e-4, 30.0, -41.0, 0.0]))])
more("cosh", lambda: [call(aten.cosh.default, torch.tensor([1e-4, 30.0, -88.0, 0.0]))])
more("hardswish", lambda: [call(aten.hardswish.default, 9 * f(3, 5))])
for name in ("xlogy", "special_xlogy"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(getattr(op, op.overloads()[0]), share(3, 5), share(3, 5)),
        call(getattr(op, op.overloads()[0]), torch.zeros(4), odd(4)),
    ]
CASES["special_xlog1py"] = lambda: [call(aten.special_xlog1py.default, share(3, 5), p(5))]
for name in ("logaddexp", "logaddexp2"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, 9 * f(3, 5), f(5)),
        call(op, torch.tensor([INF, INF, -INF, -INF, 1.0]), torch.tensor([INF, -INF, -INF, 2.0, NAN])),
    ]
for name in ("logit", "special_logit"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, 0.1 + 0.8 * torch.rand(3, 5)),
        call(op, share(3, 5), 0.01),
    ]
CASES["prelu"] = lambda: [
    call(aten.prelu.default, f(3, 5, 2), f(5)),
    call(aten.prelu.default, f(3, 5, 2), f(1)),
]
CASES["_prelu_kernel"] = lambda: [call(aten._prelu_kernel.default, f(3, 5, 2), f(1, 5, 1))]
CASES["celu"] = lambda: [call(aten.celu.default, f(3, 5)), call(aten.celu.default, f(3, 5), 0.5)]
CASES["selu"] = lambda: [call(aten.selu.default, f(3, 5))]
more("elu", lambda: [call(aten.elu.default, f(3, 5), 1.2, 1.05, 0.7)])
CASES["threshold"] = lambda: [call(aten.threshold.default, f(3, 5), 0.1, -2.0)]
CASES["softshrink"] = lambda: [call(aten.softshrink.default, f(3, 5)), call(aten.softshrink.default, odd(3, 5), 0.2)]
CASES["hardshrink"] = lambda: [call(aten.hardshrink.default, f(3, 5)), call(aten.hardshrink.default, f(3, 5), 0.2)]
CASES["glu"] = lambda: [call(aten.glu.default, f(3, 10)), call(aten.glu.default, f(2, 6, 5), 1)]
CASES["hypot"] = lambda: [
    call(aten.hypot.default, f(3, 5), f(5)),
    call(aten.hypot.default, torch.tensor([0.0, 1e30]), torch.tensor([0.0, 1e30])),
]
for name in ("fmax", "fmin"):
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, odd(3, 5), f(5)), call(op, f(3, 5), odd(3, 5))]
CASES["heaviside"] = lambda: [call(aten.heaviside.default, f(3, 5).round(), torch.tensor(0.5))]
CASES["lerp"] = lambda: [
    call(aten.lerp.Scalar, f(3, 5), f(3, 5), 0.3),
    call(aten.lerp.Tensor, f(3, 5), f(3, 5), share(3, 5)),
]
CASES["addcmul"] = lambda: [
    call(aten.addcmul.default, f(3, 5), f(3, 5), f(3, 5)),
    call(aten.addcmul.default, f(3, 5), f(3, 5), f(3, 5), value=0.5),
]
CASES["addcdiv"] = lambda: [call(aten.addcdiv.default, f(3, 5), f(3, 5), p(3, 5), value=-2.0)]
binary("multiply", f, f, 1.5)
binary("not_equal less less_equal greater greater_equal", i, i, 2)
binary("fmod", f, p, 0.7)
more("fmod", lambda: [call(aten.fmod.Tensor, i(3, 5), i(5, least=1)), call(aten.fmod.Scalar, i(3, 5), -3)])
for name in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"):
    more(name, lambda op=getattr(aten, name): [call(op.Tensor, i(3, 5), i(5)), call(op.Scalar, i(3, 5), 3)])
more("bitwise_not", lambda: [call(aten.bitwise_not.default, i(3, 5))])
for name in ("logical_and", "logical_or", "logical_xor"):
    more(
        name,
        lambda op=getattr(aten, name).default: [
            call(op, i(3, 5, least=-1, most=2), b(5)),
            call(op, f(5).round(), b(5)),
        ],
    )
for name in ("bitwise_left_shift", "bitwise_right_shift"):
    CASES[name] = lambda op=getattr(aten, name).Tensor_Scalar: [call(op, i(3, 5), 2), call(op, i(3, 5), 0)]
CASES["__lshift__"] = lambda: [call(aten.__lshift__.Scalar, i(3, 5), 3)]
CASES["__rshift__"] = lambda: [call(aten.__rshift__.Scalar, i(3, 5), 1)]
more(
    "pow",
    lambda: [call(aten.pow.Tensor_Scalar, f(3, 5), k) for k in (0, 1, 4, 5, -1, -2, -3, 9, 1.5)]
    + [call(aten.pow.Tensor_Scalar, p(3, 5), k) for k in (0.5, 2.5, -1.5, 11)]
    + [call(aten.pow.Scalar, 0.9, i(3, 5)), call(aten.pow.Scalar, 2.0, f(3, 5))]
    + [call(aten.pow.Tensor_Tensor, f(3, 5), i(5).float()), call(aten.pow.Tensor_Scalar, i(3, 5), 3)],
)
more(
    "nan_to_num", lambda: [call(aten.nan_to_num.default, i(3, 5)), call(aten.nan_to_num.default, odd(3, 5), None, 1.0)]
)
more("rsub", lambda: [call(aten.rsub.Scalar, f(3, 5), 1.0, 2), call(aten.rsub.Tensor, f(3, 5), f(5), alpha=0.5)])
