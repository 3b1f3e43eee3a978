"""Index notation: `s[b, h, m, n] = sum_d q[b, h, m, d] * k[b, h // 2, n, d]`."""

from __future__ import annotations

from rewriter.ir.nodes import (
    TRUE,
    Apply,
    Axis,
    Const,
    Index,
    Load,
    Node,
    Output,
    Param,
    Program,
    Reduce,
    Ref,
    Where,
)
from rewriter.ir.ops import OPS

_LEVEL = {
    "or": 1,
    "xor": 2,
    "and": 3,
    "eq": 4,
    "ne": 4,
    "lt": 4,
    "le": 4,
    "gt": 4,
    "ge": 4,
    "add": 5,
    "sub": 5,
}
_LEVEL |= {"bitor": 1, "bitxor": 2, "bitand": 3}
_LEVEL |= {"mul": 6, "div": 6, "floordiv": 6, "mod": 6, "pow": 8}
_ATOM = 9
_PYTHON = {"maximum": "max", "minimum": "min"}  # of sizes, which are printed as Python too


def show(node: Node, names: dict[Axis, str] | None = None) -> str:
    """One line for one node. `names` renames axes; unnamed bound axes print as they are."""
    return _show(node, names or {})[0]


def _axis(axis: Axis, names: dict[Axis, str]) -> str:
    return names.get(axis, axis.name)


def _show(node: Node, names: dict[Axis, str]) -> tuple[str, int]:
    """(text, binding strength)"""
    match node:
        case Const():
            return (f"{node.value:g}" if isinstance(node.value, float) else str(node.value)), _ATOM
        case Param():
            return node.name, _ATOM
        case Index():
            return _axis(node.axis, names), _ATOM
        case Load() | Ref():
            name = node.tensor.name if isinstance(node, Load) else node.name
            return (f"{name}[{', '.join(show(i, names) for i in node.index)}]" if node.index else name), _ATOM
        case Where():
            return f"where({', '.join(show(c, names) for c in node.children)})", _ATOM
        case Reduce():
            return _show_reduce(node, names)
    return _show_apply(node, names)


def _show_reduce(node: Reduce, names: dict[Axis, str]) -> tuple[str, int]:
    bound = ",".join(_axis(a, names) for a in node.axes)
    condition = "" if node.predicate is TRUE else f" | {show(node.predicate, names)}"
    body, level = _show(node.body, names)
    text = f"{node.op}_{{{bound}{condition}}}" if condition or "," in bound else f"{node.op}_{bound}"
    return f"{text} {body if level >= 6 else f'({body})'}", 5


def _show_apply(node: Apply, names: dict[Axis, str]) -> tuple[str, int]:
    if node.op == "cast":
        return f"{str(node.dtype).removeprefix('torch.')}({show(node.args[0], names)})", _ATOM
    if node.op == "neg":
        text, level = _show(node.args[0], names)
        return (f"-{text}" if level > 6 else f"-({text})"), 7
    infix = OPS[node.op].infix
    if not infix:
        name = node.op if node.dtype.is_floating_point else _PYTHON.get(node.op, node.op)
        return f"{name}({', '.join(show(a, names) for a in node.args)})", _ATOM
    level = _LEVEL[node.op]
    (left, left_level), (right, right_level) = (_show(a, names) for a in node.args)
    left = left if left_level >= level + (level == _LEVEL["eq"]) else f"({left})"
    right = right if right_level > level else f"({right})"
    return f"{left} {infix} {right}", level


def show_output(output: Output, names: dict[Axis, str] | None = None) -> str:
    """`out[b, h, m, e] = ...`"""
    single = {a: "0" for a in output.axes if a.extent is Const(1)}
    axes = [show(p, names) for p in output.at] or [_axis(a, single | (names or {})) for a in output.axes]
    return f"{output.name}[{', '.join(axes)}] = {show(output.body, names)}"


def show_program(program: Program) -> str:
    """Every output on a line of its own, then the extents of its axes."""
    return "\n".join(show_output(o) for o in program.outputs)
