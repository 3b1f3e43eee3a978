"""The part of a stream that a loop runs over, where predicates leave less than all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewriter.emit.expr import Text
from rewriter.emit.scope import Line, Scope
from rewriter.ir import Apply, Index, Load, Node, walk
from rewriter.ir.integer import from_poly, plus, to_poly
from rewriter.plan import Sweep
from rewriter.sparsity import EVERYWHERE

if TYPE_CHECKING:
    from rewriter.emit.values import Values


SAID = "What masks leave these rows of the stream, in whole tiles where they cut none."
SAID_OF_PART = "This part of the stream, in whole tiles: none where it is too short for as many parts."


@dataclass(frozen=True)
class Span:
    """Names, or plain texts: tiles start at `first`, and before `last`. In those from `whole` to before `cut` every
    predicate holds; `whole` and `cut` are "" where no such are known.
    """

    first: str
    last: str
    whole: str = ""
    cut: str = ""


def written_span(values: Values, sweep: Sweep, scope: Scope) -> Span:
    """Writes what the ends are of a tile of rows: the least of their lower ones, the greatest of their upper ones, and
    the other way round where all of the rows are meant.
    """
    support = sweep.support or EVERYWHERE
    outer, inner = support.outer, support.inner if sweep.support else None
    extent, block = values.value(sweep.stream.extent, values.prologue).code, values.block(sweep.stream)
    said = [SAID] if sweep.support else []

    def named(hint: str, code: str) -> str:
        name = values.names.unique(hint)
        scope.lines.append(Line(f"{name} = {code}", "", said.pop() if said else ""))
        return name

    def end(node: Node, fold: str, most: str = "") -> str:
        """Not below 0, or not beyond `most`; in 64 bits neither, so that it is a number of 32."""
        code = _at_an_end(values, node, fold, scope) or _folded(values.value(node, scope), fold)
        if _is_wide(node):
            return f"tl.minimum(tl.maximum({code}, 0), {most or extent}).to(tl.int32)"
        return f"tl.minimum({code}, {most})" if most else f"tl.maximum({code}, 0)"

    first, last, until = "0", extent, ""
    if outer.lower is not None:
        first = named("first", f"{end(outer.lower, 'min')} // {block} * {block}")
    if outer.upper is not None:
        until = end(outer.upper, "max", extent)
        last = named("last", until)
    if sweep.part:
        said.append(SAID_OF_PART)
        first, last = _of_part(values, sweep, first, last, named)
    if inner is None:
        return Span(first, last)
    whole = first
    if inner.lower is not None:
        whole = named("whole", f"tl.maximum(tl.cdiv({end(inner.lower, 'max')}, {block}) * {block}, {first})")
    most = last if sweep.part else extent
    upper = most if inner.upper is None else end(inner.upper, "min", most)
    upper = last if upper == until else upper
    return Span(first, last, whole, named("cut", f"tl.maximum({upper} // {block} * {block}, {whole})"))


def _is_wide(end: Node) -> bool:
    """Whether an end is loaded in 64 bits: a loop counts in as many as its ends have."""
    return any(isinstance(n, Load) and n.dtype is torch.int64 for n in walk(end))


def _of_part(values: Values, sweep: Sweep, first: str, last: str, named: Callable[[str, str], str]) -> tuple[str, str]:
    """The ends of one of the parts, which are equally long but for the last."""
    block, part = values.block(sweep.stream), values.names.axes[sweep.part]
    parts = values.value(sweep.part.extent, values.prologue).code
    length = named("length", f"tl.cdiv({last}{'' if first == '0' else f' - {first}'}, {block} * {parts}) * {block}")
    begin = named("begin", f"{'' if first == '0' else f'{first} + '}{part} * {length}")
    return begin, named("end", f"tl.minimum({begin} + {length}, {last})")


def _at_an_end(values: Values, node: Node, fold: str, scope: Scope) -> str:
    """The least or greatest value over a tile of rows of what grows with them, without looking at all of them:

    max over m of m + 1  →  start_m + BLOCK_M

    "" where it is not known to grow.
    """
    rows = [a for a in values.plan.rows if a in node.free]
    if not rows:
        return values.value(node, scope).code
    if isinstance(node, Apply) and node.op in ("minimum", "maximum"):
        ends = [_at_an_end(values, a, fold, scope) for a in node.args]
        return f"tl.{node.op}({', '.join(ends)})" if all(ends) else ""
    row, rest = rows[0], plus(to_poly(node), to_poly(Index(rows[0])), -1)
    if len(rows) > 1 or any(row in factor.free for monomial in rest for factor in monomial):
        return ""
    terms = [f"start_{values.names.axes[row]}", *([values.block(row)] if fold == "max" else [])]
    rest = plus(rest, {(): 1}, -1) if fold == "max" else rest
    number = rest.pop((), 0)
    terms += [values.value(from_poly(rest), scope).tight(5)] if rest else []
    return " + ".join(terms) + (f" {'-' if number < 0 else '+'} {abs(number)}" if number else "")


def _folded(text: Text, fold: str) -> str:
    """Over the rows of a tile."""
    return f"tl.{fold}({text.code}, 0)" if text.axes else text.code
