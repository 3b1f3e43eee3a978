"""What a trace assumes of the sizes: those that became numbers, and the branches that were taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Mod

from rewriter.errors import Reason, Site
from rewriter.ir import Const, Param
from rewriter.trace import spelled
from rewriter.trace.calls import call_name
from rewriter.trace.equations import settled, settled_condition
from rewriter.trace.ones import Dimension
from rewriter.trace.sizes import relation_text, size_node
from rewriter.trace.source import is_user_file, origin_of


def assumed(
    graph: fx.Graph,
    inputs: tuple[str | None, ...],
    parameters: dict[str, str],
    bound: Mapping[Dimension, Site | None],
) -> tuple[Reason, ...]:
    """Sizes of inputs that are numbers in the kernels, and branches on sizes, with the user's line for each."""
    lines, names = _lines_by_number(graph), {}
    out = []
    for k, name in enumerate(inputs):
        held = next(n for n in graph.nodes if n.name == name).meta["val"] if name else None
        for d, size in enumerate(held.shape if name else ()):
            text, number = f"{parameters.get(name, name)}.shape[{d}]", size_node(size)
            if isinstance(number, Const):
                out.append(_fixed(graph, text, number.value, (k, d), bound, lines))
            elif isinstance(number, Param):
                names.setdefault(number.name, text)
    return (*out, *_branches(graph, names))


def _fixed(graph: fx.Graph, text: str, number: int, dimension: Dimension, bound, lines: dict[int, Site]) -> Reason:
    if dimension in bound:
        return Reason(f"{text} = {number}, kept whole by a kernel", lines.get(number) or bound[dimension])
    site = lines.get(number) or _first_use(graph, number)
    return Reason(f"{text} = {number}, fixed by the program", site)


def _branches(graph: fx.Graph, names: dict[str, str]) -> list[Reason]:
    """Conditions on sizes under which the program goes the way that was traced."""
    environment = _environment(graph)
    held = [(settled_condition(guard, environment), site) for guard, site in _user_guards(graph)]
    return [
        Reason(f"{relation_text(guard, names)}: the branch that was traced", site)
        for guard, site in dict(held).items()
        if guard.free_symbols
    ]


def conditions_of(graph: fx.Graph) -> tuple[sympy.Expr, ...]:
    """What must hold of the sizes for the traced branches to be the right ones."""
    environment = _environment(graph)
    conditions = [g for g, _ in _user_guards(graph)]
    for node in graph.nodes:
        for size in _symbols(node.meta.get("val")):
            conditions += settled(size)[1]
    conditions = [settled_condition(c, environment) for c in dict.fromkeys(conditions)]
    return tuple(dict.fromkeys(c for c in conditions if c.free_symbols))


def as_known(graph: fx.Graph, condition: sympy.Expr) -> sympy.Expr:
    """A condition with the sizes that have been fixed since it was found."""
    environment = _environment(graph)
    return environment.replace(condition) if environment else condition


def _environment(graph: fx.Graph):
    """The tracer's record of guards, None for a program without symbolic sizes."""
    values = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    first = next((s for v in values for s in _symbols(v)), None)
    return first.node.shape_env if first is not None else None


def _user_guards(graph: fx.Graph) -> list[tuple[sympy.Expr, Site | None]]:
    """Conditions on sizes that the user's own lines decided. Torch's own are about speed, not meaning, but where one
    made a number of a size: s // 2 == 3.
    """
    environment = _environment(graph)
    out = []
    for guard in environment.guards if environment else ():
        frame = guard.sloc.framework_loc
        file = getattr(frame, "filename", "<")
        if is_user_file(file):
            out.append((guard.expr, Site(file, frame.lineno)))
        elif file == spelled.__file__:
            out.append((guard.expr, _site_of_call(graph, "scaled_dot_product_attention")))
        elif _makes_number(guard.expr):
            out.append((guard.expr, None))
    return out


def _makes_number(guard: sympy.Basic) -> bool:
    """s // 2 == 3; of a size itself it is a number from there on, and what is divided without rest stays symbolic."""
    if not isinstance(guard, sympy.Eq):
        return False
    size, number = guard.args[::-1] if guard.lhs.is_number else guard.args
    return number.is_number and not size.is_Symbol and not isinstance(size, Mod)


def _site_of_call(graph: fx.Graph, name: str) -> Site | None:
    """The user's first call of an op."""
    origins = (origin_of(n) for n in graph.nodes if n.op == "call_function" and call_name(n) == name)
    return next((Site(o.file, o.line) for o in origins if o.file), None)


def _lines_by_number(graph: fx.Graph) -> dict[int, Site]:
    """The user's line that turned a size into a number."""
    environment = _environment(graph)
    out: dict[int, Site] = {}
    for guard, site in _user_guards(graph):
        for symbol in guard.free_symbols if isinstance(guard, sympy.Eq) else ():
            number = environment.replace(symbol)
            if number.is_Integer:
                out.setdefault(int(number), site)
    return out


def _first_use(graph: fx.Graph, number: int) -> Site | None:
    """The user's first call that is given a number, or a parameter or buffer of that size."""
    using = (n for n in graph.nodes if n.op == "call_function" and number > 1 and number in _numbers(n))
    origins = (origin_of(n) for n in using)
    return next((Site(o.file, o.line) for o in origins if o.file), None)


def _numbers(node: fx.Node) -> list[int]:
    held: list[int] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: _note_number(a, held))
    return held


def _note_number(value: Any, held: list[int]) -> None:
    """Adds an argument that is a number, also one that tracing writes as a symbolic size."""
    if type(value) is int:
        held.append(value)
    elif isinstance(value, torch.SymInt) and value.node.expr.is_number:
        held.append(int(value.node.expr))


def _symbols(value: Any) -> list[torch.SymInt]:
    return [s for s in value.shape if isinstance(s, torch.SymInt)] if torch.is_tensor(value) else []
