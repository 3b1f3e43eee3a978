"""From a program to a chain: every reduction in the first sweep that has a form for it, proved on random values.

Before that, reductions are split at concatenations; a rule that fits no value is a reason, never a guess.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rewriter.derive.axes import Axes
from rewriter.derive.builder import Builder
from rewriter.derive.chain import Chain
from rewriter.derive.forms import NotDerivable
from rewriter.derive.normal import is_bilinear, normalise
from rewriter.derive.prove import prove
from rewriter.ir import Apply, Node, Output, Program, Where, apply, const, transform, where


def derive(program: Program, masked_rows: str = "match") -> Chain:
    """The chain of a program, proved on random values.

    masked_rows: "match" gives rows that see nothing but -inf what eager gives them, "zero" gives zeros.
    Raises NotDerivable."""
    outputs = tuple(replace(o, body=normalise(o.body)) for o in program.outputs)
    if all(is_bilinear(o.body) for o in outputs):
        raise NotDerivable("a chain of matrix products without anything between them is left to the matrix products")
    chain = _chain(program, outputs, math.nan)
    proof = prove(program, chain)
    if not proof.ok:
        raise NotDerivable(f"not proved: {proof.reason}")
    if masked_rows == "zero":
        chain = _chain(program, outputs, 0.0)
    return replace(chain, derivation=(*chain.derivation, str(proof)))


def _chain(program: Program, outputs: tuple[Output, ...], empty_row: float) -> Chain:
    axes = Axes()
    outputs = axes.of_outputs(outputs)
    builder = Builder(axes, empty_row)
    bodies = builder.outputs([o.body for o in outputs])
    if not builder.definitions:
        raise NotDerivable("no reduction is left over a stream")
    if empty_row == 0.0:
        bodies = [transform(b, _zero_by_zero) for b in bodies]
    settled = tuple(replace(o, body=b) for o, b in zip(outputs, bodies))
    notes = tuple(dict.fromkeys(builder.notes))
    return Chain(program.name, axes.order, tuple(builder.definitions), settled, notes, program.origins)


def _zero_by_zero(node: Node) -> Node:
    """where(empty, 0, acc) / where(empty, 0, l)  →  where(empty, 0, acc / l), for rows that are to be zero"""
    if not (isinstance(node, Apply) and node.op == "div" and all(isinstance(a, Where) for a in node.args)):
        return node
    over, under = node.args
    if over.predicate is not under.predicate or not over.then is under.then is const(0.0):
        return node
    return where(over.predicate, over.then, apply("div", over.other, under.other))
