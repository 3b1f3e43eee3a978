"""Triton text of pointwise nodes over tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rewriter.ir import Apply, Axis, Const, Node
from rewriter.ir.integer import nonnegative, to_poly

TRITON_DTYPES = {
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float64: "tl.float64",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
INFIX = {
    "add": ("+", 5),
    "sub": ("-", 5),
    "mul": ("*", 6),
    "div": ("/", 6),
    "floordiv": ("//", 6),
    "mod": ("%", 6),
}
INFIX |= {"eq": ("==", 2), "ne": ("!=", 2), "lt": ("<", 2), "le": ("<=", 2), "gt": (">", 2), "ge": (">=", 2)}
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
INFIX |= {"and": ("&", 4), "or": ("|", 3), "xor": ("^", 3)}
INFIX |= {"bitand": ("&", 4), "bitor": ("|", 3), "bitxor": ("^", 3), "fmod": ("%", 6)}
IN_FLOATS = ("floordiv", "mod", "fmod")  # which Triton has for integers alone
CALLS = {
    n: f"tl.{n}"
    for n in [
        "exp2",
        "log",
        "log2",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "sigmoid",
        "erf",
        "floor",
        "ceil",
        "abs",
        "maximum",
        "minimum",
    ]
}
ATOM = 9


class NotEmittable(Exception):
    """Something a tile of at most two dimensions, or Triton, does not express."""


@dataclass(frozen=True)
class Text:
    """An expression over a tile: `axes` are its dimensions in order, `level` how tightly it binds.

    A `narrow` one is held in 16 bits, as it was loaded: arithmetic on it would round there.
    """

    code: str
    axes: tuple[Axis, ...] = ()
    level: int = ATOM
    narrow: bool = False

    def tight(self, level: int) -> str:
        return self.code if self.level >= level else f"({self.code})"


def widened(texts: list[Text], calls: bool) -> list[Text]:
    """Operands of arithmetic: in fp32 where none of them is, and always those of a function."""
    if not (calls or all(t.narrow for t in texts)):
        return texts
    return [Text(f"{t.tight(ATOM)}.to(tl.float32)", t.axes) if t.narrow else t for t in texts]


def spread(text: Text, axes: tuple[Axis, ...]) -> str:
    """`x[:, None]` and the like: the text as an operand of a tile over `axes`."""
    if text.axes == axes or not text.axes:
        return text.code if text.axes == axes else text.tight(6)
    subscript = ", ".join(":" if a in text.axes else "None" for a in axes)
    return f"{text.tight(ATOM)}[{subscript}]"


def operand(text: Text, axes: tuple[Axis, ...], level: int) -> str:
    if text.axes == axes or not text.axes:
        return text.tight(level)
    return spread(text, axes)


# Of what decides something: Triton's own may be off by two units in the last place, so that x / x is not 1.
ROUNDED = {"div": "tl.div_rn", "sqrt": "tl.sqrt_rn"}


def apply_text(
    node: Apply, args: list[Text], axes: tuple[Axis, ...], helpers: set[str], half: bool, decides: bool = False
) -> Text:
    """The text of one pointwise op; `helpers` collects functions the file must define. decides: what reads it compares."""
    if node.op == "cast":
        return _cast(node, args[0])
    if node.op == "mod" and not _plain_division(node) and (ones := _ones(node)):
        return Text(f"{operand(args[0], axes, 5)} & {ones}", axes, 4)
    if node.op in ("floordiv", "mod") and not node.dtype.is_floating_point and not _plain_division(node):
        return _helper({"floordiv": "floor_div", "mod": "floor_mod"}[node.op], args, axes, helpers)
    if node.op == "div" and _reciprocal(node.args[1], half):
        return Text(f"{operand(args[0], axes, 6)} * (1.0 / {args[1].code})", axes, 6)
    if decides and node.op in ROUNDED and all(a.dtype.is_floating_point for a in node.args):
        return Text(f"{ROUNDED[node.op]}({', '.join(spread_argument(a, axes) for a in args)})", axes)
    if node.op in INFIX and not (node.op in IN_FLOATS and node.dtype.is_floating_point):
        symbol, level = INFIX[node.op]
        tighter = level + (symbol in COMPARISONS)  # Python chains them: a <= b == 0 is a <= b and b == 0
        left, right = operand(args[0], axes, tighter), operand(args[1], axes, level + 1)
        return Text(f"{left} {symbol} {right}", axes, level)
    if node.op in ("maximum", "minimum") and node.dtype.is_floating_point:
        return _helper(node.op, args, axes, helpers)
    if node.op == "exp":
        return exponential(Text(spread_argument(args[0], axes), axes, args[0].level), half)
    if node.op in CALLS:
        return Text(f"{CALLS[node.op]}({', '.join(spread_argument(a, axes) for a in args)})", axes)
    return _spelled(node, args, axes, helpers, half)


def exponential(exponent: Text, half: bool) -> Text:
    """exp, by exp2 where operands have 16 bits: it makes results below 1e-38 zero, and to keep those costs `tl.exp` three
    operations an element.
    """
    return Text(f"tl.exp2({exponent.tight(6)} * LOG2E)" if half else f"tl.exp({exponent.code})", exponent.axes)


def _reciprocal(divisor: Node, half: bool) -> bool:
    """A constant by whose reciprocal one may multiply: powers of 2, and in 16-bit programs others. A division costs eight
    multiplications.
    """
    if not isinstance(divisor, Const) or divisor.value in (0, math.inf, -math.inf):
        return False
    size, exponent = math.frexp(divisor.value)
    return half or (abs(size) == 0.5 and abs(exponent) < 126)


def spread_argument(text: Text, axes: tuple[Axis, ...]) -> str:
    return text.code if text.axes == axes or not text.axes else spread(text, axes)


def _helper(name: str, args: list[Text], axes: tuple[Axis, ...], helpers: set[str]) -> Text:
    helpers.add(name)
    return Text(f"{name}({', '.join(spread_argument(a, axes) for a in args)})", axes)


def _plain_division(node: Apply) -> bool:
    """Triton rounds towards zero, torch down: the same for what is proved not to be negative."""
    return nonnegative(to_poly(node.args[0])) and nonnegative(to_poly(node.args[1]))


def _ones(node: Apply) -> int:
    """x % 2 ** k is x & 2 ** k - 1, with the sign that torch gives it; 0 of other divisors"""
    divisor = node.args[1]
    is_whole = isinstance(divisor, Const) and not node.dtype.is_floating_point and divisor.value > 1
    return divisor.value - 1 if is_whole and not divisor.value & (divisor.value - 1) else 0


def _cast(node: Apply, arg: Text) -> Text:
    source = node.args[0].dtype
    if source.is_floating_point and node.dtype.is_floating_point:
        return arg
    if isinstance(node.args[0], Const):
        return arg
    target = _register(node)
    if arg.axes:
        return Text(f"{arg.tight(ATOM)}.to({target})", arg.axes)
    return Text(f"tl.cast({arg.code}, {target})")  # a size may be a number of Python's


def _register(node: Node) -> str:
    """The type a value has in registers."""
    return "tl.float32" if node.dtype.is_floating_point else TRITON_DTYPES[node.dtype]


def _spelled(node: Apply, args: list[Text], axes: tuple[Axis, ...], helpers: set[str], half: bool) -> Text:
    a = operand(args[0], axes, 7)
    match node.op:
        case "neg":
            return Text(f"-{a}", axes, 7)
        case "not":
            return Text(f"{operand(args[0], axes, ATOM)} == 0", axes, 2)
        case "isinf":
            return Text(f"tl.abs({spread_argument(args[0], axes)}) == float('inf')", axes, 2)
        case "isnan":
            return Text(f"{operand(args[0], axes, 3)} != {operand(args[0], axes, 3)}", axes, 2)
        case "sign":
            above, below = (f"({operand(args[0], axes, 3)} {sign} 0).to({_register(node)})" for sign in "><")
            return Text(f"{above} - {below}", axes, 5)
        case "round16":
            return Text(f"{operand(args[0], axes, ATOM)}.to(tl.float16).to(tl.float32)", axes)
        case "tanh":
            return _helper("fast_tanh" if half else "tanh", args, axes, helpers)
        case "expm1" | "log1p" | "round" | "truncdiv" | "pow":
            return _helper(node.op, args, axes, helpers)
        case "mod" | "fmod" | "floordiv":
            return _helper(f"float_{node.op}", args, axes, helpers)
    raise NotEmittable(f"{node.op} has no Triton text")


def constant(node: Const) -> str:
    value = node.value
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, float) and value != value:
        return 'float("nan")'
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{"-" if value < 0 else ""}inf")'
    return repr(value)


def dtype_text(node: Node) -> str:
    return TRITON_DTYPES[node.dtype]
