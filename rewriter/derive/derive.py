"""From a program to a chain: every reduction in the first sweep that has a form for it, proved on random values.

Before that, reductions are split at concatenations; a rule that fits no value is a reason, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rewriter.derive.axes import Axes
from rewriter.derive.bound import bounded
from rewriter.derive.builder import Builder
from rewriter.derive.chain import Chain, Definition
from rewriter.derive.exponentials import is_exp
from rewriter.derive.factors import without_cast
from rewriter.derive.forms import NotDerivable
from rewriter.derive.normal import is_bilinear, normalise
from rewriter.derive.prove import Proof, prove
from rewriter.derive.unmerge import unmerged
from rewriter.ir import Apply, Load, Node, Origin, Output, Program, Where, apply, const, transform, walk, where


def derive(program: Program, masked_rows: str = "match", is_wanted: Callable[[Chain], bool] = lambda _: True) -> Chain:
    """The chain of a program, proved on random values.

    masked_rows: "match" gives rows that see nothing but -inf what eager gives them, "zero" gives zeros. is_wanted: of
    chains that are not, no proof is tried.

    Where the forms of fewest sweeps are not proved, each reduction waits for what it reads: exp(x - logsumexp(x)) is
    exp(x) / sum exp(x) only where no sum beside a large fill is rounded. Raises NotDerivable."""
    program = replace(program, outputs=unmerged(program.outputs))
    outputs = tuple(replace(o, body=normalise(o.body)) for o in program.outputs)
    if all(is_bilinear(o.body) for o in outputs):
        raise NotDerivable("a chain of matrix products without anything between them is left to the matrix products")
    chain, waits = _chain(program, outputs), False
    if not is_wanted(chain):
        raise NotDerivable("eager is better")
    proof = prove(program, chain)
    if not proof.ok:
        chain, waits, proof = _waiting(program, outputs, proof)
    is_bounded = bounded(chain) is not chain and prove(program, bounded(chain)).ok
    if masked_rows == "zero":
        chain = _chain(program, outputs, waits, empty_is_zero=True)
    chain = bounded(chain) if is_bounded else chain
    return replace(chain, derivation=(*chain.derivation, str(proof)))


def _waiting(program: Program, outputs: tuple[Output, ...], failed: Proof) -> tuple[Chain, bool, Proof]:
    """The chain in which each reduction waits for what it reads, with its proof."""
    refused = NotDerivable(f"not proved: {failed.reason}")
    try:
        chain = _chain(program, outputs, waits=True)
    except NotDerivable:
        raise refused from None
    proof = prove(program, chain)
    if not proof.ok:
        raise refused
    note = f"another sweep for each reduction that reads another: {failed.reason} in fewer"
    return replace(chain, derivation=(*chain.derivation, note)), True, proof


def _chain(program: Program, outputs: tuple[Output, ...], waits: bool = False, empty_is_zero: bool = False) -> Chain:
    axes = Axes()
    outputs = axes.of_outputs(outputs)
    taken = frozenset([*(t.name for t in program.tensors), *(o.name for o in outputs)])
    builder = Builder(axes, empty_is_zero, waits, taken, program.lengths)
    bodies = builder.outputs([o.body for o in outputs])
    if not builder.definitions:
        raise NotDerivable("no reduction is left over a stream")
    if empty_is_zero:
        weights = {replace(d.ref, final=True) for d in builder.definitions if _sums_exponentials(d)}
        bodies = [transform(b, lambda n: _zero_by_zero(n, weights)) for b in bodies]
    settled = tuple(replace(o, body=b) for o, b in zip(outputs, bodies))
    notes = tuple(dict.fromkeys(builder.notes))
    origins = program.origins | _origins_of_epilogues(program, bodies)
    return Chain(program.name, axes.order, tuple(builder.definitions), settled, notes, origins)


def _origins_of_epilogues(program: Program, bodies: list[Node]) -> dict[Node, Origin]:
    """Where outputs come from that are more than what is reduced: they read tensors, element by element."""
    found = {b: program.origins.get(o.body) for o, b in zip(program.outputs, bodies) if not b.depth}
    return {b: origin for b, origin in found.items() if origin and any(isinstance(n, Load) for n in walk(b))}


def _sums_exponentials(definition: Definition) -> bool:
    """A sum that is 0 where nothing is summed, and else is not, save for underflow."""
    factors = definition.rest
    return definition.op == "sum" and bool(definition.shift or (factors and all(map(is_exp, factors))))


def _zero_by_zero(node: Node, weights: set[Node]) -> Node:
    """a / l  →  where(l == 0, 0, a / l) where l is among `weights`, or 0, for rows that are to be zero"""
    if not (isinstance(node, Apply) and node.op == "div"):
        return node
    under = without_cast(node.args[1])
    total = under
    while isinstance(total, Where) and total.other is const(0.0):
        total = without_cast(total.then)
    if total not in weights:
        return node
    return where(apply("eq", under, const(0.0)), const(0.0, node.dtype), node)
