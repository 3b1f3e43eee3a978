"""Sizes that the program needs to be equal, though torch has not solved for them: each is written as one.

Min(128, s) → s, [Min(128, s) = s]     a buffer's slice, as long as asked or as the buffer, added to a tensor of s
4 * (s // 4) → s, [s % 4 = 0]          a tensor of s viewed as groups of 4
(s + 1) // 2 → s // 2, [s % 2 = 0]     two chunks of s, added
t → s                                  x[.., t] contracted with y[.., s]: the inputs' own guards compare them
ceil(float(-2 * s) / -1.0) → 2 * s     arange(s, -s, -1.0)
trunc(0.5 * float(s)) → s // 2         interpolate(x, scale_factor=0.5)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch
from torch._dynamo.source import TensorProperty
from torch.utils._sympy.functions import FloorDiv, Mod


def settled(size: torch.SymInt | torch.SymFloat) -> tuple[sympy.Expr, list[sympy.Expr]]:
    """A size with what the program needs to be equal written as one, and the conditions for that."""
    expr, used = whole(size.node.expr), []
    for equation in _equations(size.node.shape_env):
        if expr.has(equation.old):
            expr = whole(expr.xreplace({equation.old: equation.new}))
            used += equation.conditions
    return expr, used


def settled_condition(condition: sympy.Basic, environment) -> sympy.Basic:
    """A condition in the symbols that settled sizes have."""
    same = {e.old: e.new for e in _equations(environment) if e.old.is_Symbol}
    return whole(environment.replace(condition)).xreplace(same)


def whole(expr: sympy.Basic) -> sympy.Basic:
    """Whole numbers without floating point between.

    ceil(float(-2 * s) / -1.0)  →  2 * s"""
    return expr.replace(lambda e: type(e).__name__ in _ROUNDED and _is_quotient(e), _rounded)


_ROUNDED = ("CeilToInt", "FloorToInt", "TruncToInt")
FINEST = 1 << 10  # of binary fractions: a size times one is exact
_DIVIDED = ("FloatTrueDiv", "IntTrueDiv")


def _is_quotient(rounded: sympy.Expr) -> bool:
    """Whether whole numbers are divided; what is rounded towards zero must not be negative."""
    quotient = _quotient(rounded.args[0])
    return quotient is not None and bool(type(rounded).__name__ != "TruncToInt" or quotient.is_nonnegative)


def _rounded(rounded: sympy.Expr) -> sympy.Expr:
    above, below = sympy.together(_quotient(rounded.args[0])).as_numer_denom()
    if below == 1:
        return above
    return -FloorDiv(-above, below) if type(rounded).__name__ == "CeilToInt" else FloorDiv(above, below)


def _quotient(expr: sympy.Expr) -> sympy.Expr | None:
    """Division in floating point as a fraction of whole numbers, None where it is no such."""
    name = type(expr).__name__
    if name == "ToFloat":
        return _quotient(expr.args[0])
    if expr.is_Float:
        above, below = float(expr).as_integer_ratio()
        return sympy.Rational(above, below) if below <= FINEST else None
    if expr.is_Mul:
        parts = list(map(_quotient, expr.args))
        return None if None in parts else sympy.Mul(*parts)
    if name in _DIVIDED:
        above, below = map(_quotient, expr.args)
        return above / below if above is not None and below is not None and below.is_number else None
    return expr if expr.is_integer else None


@dataclass(frozen=True)
class _Equation:
    """Two sizes that torch needed to be equal, where `conditions` hold."""

    old: sympy.Expr
    new: sympy.Expr
    conditions: tuple[sympy.Expr, ...] = ()


@lru_cache(maxsize=4)
def _equations(environment) -> tuple[_Equation, ...]:
    """What follows from equalities that torch asked for and could not solve for a symbol."""
    asked = [whole(environment.replace(g.expr)) for g in environment.guards if isinstance(g.expr, sympy.Eq)]
    equalities = [e for e in asked if isinstance(e, sympy.Eq) and e.free_symbols]
    chunks = _equal_parts(equalities)
    exact = [e for equality in equalities for e in _exact_divisions(equality)] + chunks
    fractions = {e.old: e.new for e in exact}
    parts = _as_long(equalities, {e.old: e.new for e in chunks})
    ratios = [(e.lhs / e.rhs).xreplace(fractions) for e in equalities if e.rhs != 0]
    ratios = [*ratios, *fractions.values()]
    same = _renaming([pair for r in ratios for pair in _pairs(r, _places(environment), hints_of(environment))])
    exact = [replace(e, conditions=(_leaves_nothing(e.new.xreplace(same)),)) for e in exact]
    parts = [_Equation(old, new.xreplace(same)) for old, new in parts.items() if old not in same]
    return (*_choices(equalities), *exact, *(_Equation(old, new) for old, new in same.items()), *parts)


def _exact_divisions(equality: sympy.Eq) -> list[_Equation]:
    """h * s = 4 * h * (s // 4)  →  s // 4 = s / 4"""
    ratio = equality.lhs / equality.rhs if equality.rhs != 0 else None
    out = []
    for division in equality.atoms(FloorDiv):
        above, below = division.args
        if ratio in (above / (below * division), below * division / above):
            out.append(_Equation(division, above / below))
    return out


def _equal_parts(equalities: list[sympy.Eq]) -> list[_Equation]:
    """(s + 1) // 2 = s - (s + 1) // 2  →  (s + 1) // 2 = s / 2        the chunks of a size, all as long"""
    out = []
    for alike in _classes(equalities):
        for division in (e for e in alike if isinstance(e, FloorDiv)):
            above, parts = division.args
            size = above - parts + 1
            if parts.is_Integer and size - (parts - 1) * division in alike:
                out.append(_Equation(division, size / parts))
    return out


def _as_long(equalities: list[sympy.Eq], fractions: dict[sympy.Expr, sympy.Expr]) -> dict[sympy.Symbol, sympy.Expr]:
    """t = (s + 1) // 2 = s / 2  →  t is s / 2: the inputs' own guards compare them"""
    return {
        symbol: fractions[division]
        for alike in _classes(equalities)
        for division in fractions.keys() & alike
        for symbol in alike
        if symbol.is_Symbol and symbol not in fractions[division].free_symbols
    }


def _classes(equalities: list[sympy.Eq]) -> list[set[sympy.Expr]]:
    """Sets of what is equal."""
    classes: list[set[sympy.Expr]] = []
    for equality in equalities:
        joined = {equality.lhs, equality.rhs}
        apart = [c for c in classes if not c & joined]
        classes = [*apart, joined.union(*(c for c in classes if c & joined))]
    return classes


def _leaves_nothing(fraction: sympy.Expr) -> sympy.Eq:
    return sympy.Eq(Mod(*fraction.as_numer_denom()), 0, evaluate=False)


def _pairs(
    ratio: sympy.Expr, place: dict[sympy.Symbol, int], hints: dict[sympy.Symbol, int]
) -> list[tuple[sympy.Symbol, sympy.Symbol]]:
    """The sizes of one input that stand for those of another: b * m * n of a mask viewed as b', m', n' of the scores.

    Equal products do not make the factors equal, so these are taken to be as they were traced; the inputs' guards
    compare them.
    """
    above, below = (_symbols(side) for side in ratio.as_numer_denom())
    if not place.keys() >= {*above, *below}:
        return []
    pairs = []
    for symbol in sorted(below, key=lambda s: (place[s], str(s))):
        alike = [s for s in above if hints[s] == hints[symbol]]
        if not alike:
            return []
        chosen = min(alike, key=lambda s: (place[s] != place[symbol], place[s], str(s)))
        above.remove(chosen)
        pairs.append((symbol, chosen))
    return pairs


def _symbols(product: sympy.Expr) -> list[sympy.Symbol]:
    """The factors of a product that are symbols, as often as they occur."""
    return [s for s, power in product.as_powers_dict().items() if s.is_Symbol for _ in range(int(power))]


def _places(environment) -> dict[sympy.Symbol, int]:
    """Which dimension of its input each symbol is the size of."""
    first = {s: sources[0] for s, sources in environment.var_to_sources.items() if sources}
    return {s: source.idx for s, source in first.items() if getattr(source, "prop", None) is TensorProperty.SIZE}


def hints_of(environment) -> dict[sympy.Symbol, int]:
    """What each symbol is in the example. Later versions of torch have another name for it, and warn of the former."""
    named = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
    return getattr(environment, named)


def _renaming(pairs: list[tuple[sympy.Symbol, sympy.Symbol]]) -> dict[sympy.Symbol, sympy.Symbol]:
    """One symbol for each set of equal ones."""
    same: dict[sympy.Symbol, sympy.Symbol] = {}

    def find(s: sympy.Symbol) -> sympy.Symbol:
        while s in same:
            s = same[s]
        return s

    for first, second in pairs:
        first, second = sorted((find(first), find(second)), key=str)
        if first != second:
            same[second] = first
    return {s: find(s) for s in same}


def _choices(equalities: list[sympy.Eq]) -> list[_Equation]:
    """(longer, shorter) sides of the equalities that have one of several sizes."""
    sides = [sorted(e.args, key=lambda side: (-sympy.count_ops(side), str(side))) for e in equalities]
    pairs = dict.fromkeys((old, new) for old, new in sides if _is_choice(old) and not new.is_number)
    return [_Equation(old, new, (sympy.Eq(old, new, evaluate=False),)) for old, new in pairs]


def _is_choice(expr: sympy.Expr) -> bool:
    """A size that is one of several, or a sum with such a one."""
    return not expr.is_Mul and any(type(e).__name__ in ("Min", "Max") for e in sympy.preorder_traversal(expr))
