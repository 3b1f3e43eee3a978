"""Maxima that only shift exponents: they start at the lowest number, and are held in bits, as exp2 takes them."""

from __future__ import annotations

from collections.abc import Set

from rewriter.derive import Definition
from rewriter.emit.expr import Text, exponential, spread, widened
from rewriter.emit.scale import times
from rewriter.ir import Ref, walk
from rewriter.lift.rounding import has_fill
from rewriter.plan import KernelPlan


def in_base_2(definition: Definition, half: bool) -> bool:
    """16-bit programs without large fills: there the scaled shift's own rounding would show."""
    return half and not has_fill(definition.shift.exponent, 1e3)


def maxima_that_shift(plan: KernelPlan) -> frozenset[str]:
    """Of a kernel the maxima that nothing reads but shifts by them.

    Started at the lowest number instead of -inf, they need no care for rows that have seen nothing yet:
    exp(-inf - (-inf)) → exp(-inf - LOWEST) = 0. What such rows sum is 0 either way.
    """
    return frozenset(d.name for d in plan.chain.definitions if d.op == "max" and _only_shifts(d, plan))


def maxima_in_bits(plan: KernelPlan, half: bool) -> frozenset[str]:
    """Those by which all shifts are in base 2: they are held times log2(e)."""
    return frozenset(n for n in maxima_that_shift(plan) if all(in_base_2(d, half) for d in _shifted_by(n, plan)))


def in_bits(scale: str) -> str:
    """A constant factor, "" for none, times log2(e)"""
    return f"({scale} * LOG2E)" if scale else "LOG2E"


def less(
    exponent: Text, scale: str, shift: Text, definition: Definition, held: Set[str], lowest: Set[str], half: bool
) -> str:
    """exp(exponent · scale − shift); in base 2 the difference is one fused multiply-add an element. `held`: the maxima
    in bits; `lowest`: those that start at the lowest number, which in bits would be −inf.
    """
    if not in_base_2(definition, half):
        difference = f"{times(exponent, scale)} - {spread(shift, exponent.axes)}"
        return exponential(Text(difference, exponent.axes, 5), half).code
    if definition.shift.state.name not in held:
        in_base = f"{shift.code} * LOG2E"
        floored = f"tl.maximum({in_base}, LOWEST)" if definition.shift.state.name in lowest else f"({in_base})"
        shift = Text(floored, shift.axes)
    (exponent,) = widened([exponent], calls=True)
    return f"tl.exp2({exponent.code} * {in_bits(scale)} - {spread(shift, exponent.axes)})"


def decay(old: Text, new: str, definition: Definition, held: Set[str], half: bool) -> str:
    """exp(old − new) of what exponents are shifted by"""
    difference = Text(f"{old.tight(5)} - {new}", old.axes, 5)
    return f"tl.exp2({difference.code})" if definition.shift.state.name in held else exponential(difference, half).code


def _shifted_by(maximum: str, plan: KernelPlan) -> list[Definition]:
    return [d for d in plan.chain.definitions if d.shift and d.shift.state.name == maximum]


def _only_shifts(maximum: Definition, plan: KernelPlan) -> bool:
    shifted = _shifted_by(maximum.name, plan)
    plain = (isinstance(d.shift.phi, Ref) and not d.shift.mass and not d.centre for d in shifted)
    others = [n for d in plan.chain.definitions for n in (d.predicate, *d.rest, *_exponent(d), *_extremum(d))]
    others += [d.body for d in plan.chain.definitions if not d.shift]
    read = {n.name for n in walk(*others, *(o.body for o in plan.chain.outputs)) if isinstance(n, Ref)}
    is_sweep_s = {d.sweep for d in shifted} == {maximum.sweep}
    return is_sweep_s and all(plain) and maximum.name not in read


def _exponent(definition: Definition) -> tuple:
    return (definition.shift.exponent,) if definition.shift else ()


def _extremum(definition: Definition) -> tuple:
    return (definition.extremum,) if definition.extremum else ()
