"""The part of a stream that a loop runs over, where predicates leave less than all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewriter.emit.expr import Text
from rewriter.emit.scope import Line, Scope
from rewriter.ir import Load, Node, walk
from rewriter.plan import Sweep

if TYPE_CHECKING:
    from rewriter.emit.values import Values


SAID = "What masks leave these rows of the stream, in whole tiles where they cut none."


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
    outer, inner = sweep.support.outer, sweep.support.inner
    extent, block = values.value(sweep.stream.extent, values.prologue).code, values.block(sweep.stream)

    told = len(scope.lines)

    def named(hint: str, code: str) -> str:
        name = values.names.unique(hint)
        scope.lines.append(Line(f"{name} = {code}", "", SAID if len(scope.lines) == told else ""))
        return name

    def end(node: Node, fold: str) -> str:
        return _folded(values.value(node, scope), fold)

    first, last = "0", extent
    if outer.lower is not None:
        first = named("first", f"tl.maximum({end(outer.lower, 'min')}, 0) // {block} * {block}")
    if outer.upper is not None:
        last = named("last", f"tl.minimum({end(outer.upper, 'max')}, {extent})")
    if inner is None:
        return Span(first, last)
    whole = first
    if inner.lower is not None:
        whole = named(
            "whole", f"tl.maximum(tl.cdiv(tl.maximum({end(inner.lower, 'max')}, 0), {block}) * {block}, {first})"
        )
    upper = extent if inner.upper is None else f"tl.minimum({end(inner.upper, 'min')}, {extent})"
    return Span(first, last, whole, named("cut", f"tl.maximum({upper} // {block} * {block}, {whole})"))


def tile_start(sweep: Sweep, name: str) -> str:
    """Where a tile starts, in 32 bits: a loop between ends that are loaded counts in as many as those have."""
    ends = [sweep.support.outer, sweep.support.inner] if sweep.support and not sweep.map else []
    nodes = [n for i in ends if i for n in (i.lower, i.upper) if n is not None]
    is_wide = any(isinstance(n, Load) and n.dtype is torch.int64 for n in walk(*nodes))
    return f"tl.cast({name}, tl.int32)" if is_wide else name


def _folded(text: Text, fold: str) -> str:
    """Over the rows of a tile."""
    return f"tl.{fold}({text.code}, 0)" if text.axes else text.code
