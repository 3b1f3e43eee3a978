"""Deriving keeps the meaning of random Programs: each rule alone, and all together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from rewriter.derive import Chain, NotDerivable, derive
from rewriter.derive.factors import as_product, as_terms, quotient, split_mask, total
from rewriter.derive.normal import normalise
from rewriter.derive.prove import prove
from rewriter.derive.splits import split_concatenations
from rewriter.ir import (
    Const,
    Node,
    Output,
    Program,
    Reduce,
    Where,
    apply,
    const,
    reduce,
    walk,
    where,
)
from rewriter.ir.evaluate import evaluate
from tests.strategies import (
    FILLS,
    INF,
    M,
    N,
    assert_equivalent,
    assert_same,
    cases,
    chain_values,
    fixed,
    tensors_for,
)
from tests.wider_programs import wider_programs

sizes = st.fixed_dictionaries({"B": st.integers(1, 2), "M": st.integers(1, 5), "N": st.integers(1, 5)})
seeds = st.integers(0, 1 << 20)


def mapped(program: Program, rule: Callable[[Node], Node]) -> Program:
    return replace(program, outputs=tuple(replace(o, body=rule(o.body)) for o in program.outputs))


# Each rule


@given(cases(), sizes, seeds)
@fixed(200)
def test_splitting_concatenations(case, held, seed):
    after = mapped(case.program, split_concatenations)
    assert_equivalent(case.program, after, held, seed)
    widths = {a.extent for o in after.outputs for n in walk(o.body) if isinstance(n, Reduce) for a in n.axes}
    assert apply("add", N, Const(1)) not in widths and apply("add", M, Const(1)) not in widths


@given(cases(), sizes, seeds)
@fixed(200)
def test_normalising(case, held, seed):
    assert_equivalent(case.program, mapped(case.program, normalise), held, seed)


def over_score(case, body: Node | None = None) -> Program:
    """A program that gives `body`, a function of the score's axes, or the score itself."""
    axes = tuple(sorted(case.score.free, key=lambda a: a.name))
    body = case.score if body is None else body
    return Program("score", (Output("out", axes, body, torch.float32),))


@given(cases(), sizes, seeds)
@fixed(200)
def test_splitting_masks(case, held, seed):
    predicate, value = split_mask(case.score)
    before, after = over_score(case, case.score), over_score(case, where(predicate, value, INF))
    assert_equivalent(before, after, held, seed)


@given(cases(), sizes, seeds, st.booleans())
@fixed(200)
def test_sums_of_terms(case, held, seed, everywhere):
    shifted = apply("mul", apply("sub", case.score, const(0.5)), const(-2.0))
    assume(not any(n is INF for n in walk(shifted)))  # 0 · -inf is NaN, either way
    again = total(as_terms(shifted, everywhere))
    assert_equivalent(over_score(case, shifted), over_score(case, again), held, seed)


@given(cases(), sizes, seeds)
@fixed(200)
def test_products_of_factors(case, held, seed):
    kept = where(apply("lt", case.score, const(0.3)), case.score, const(0.0))
    body = apply(
        "div",
        apply("mul", apply("neg", kept), case.score),
        apply("div", const(3.0), apply("exp", kept)),
    )
    assume(not any(n is INF for n in walk(body)))
    product = as_product(body)
    again = where(product.predicate, quotient(product.over, product.under), const(0.0))
    assert_equivalent(over_score(case, body), over_score(case, again), held, seed)


# All together


def derived(case, masked_rows: str = "match") -> Chain:
    """Raises where the proof finds a difference; masks that contradict each other leave nothing to look at."""
    try:
        return derive(case.program, masked_rows)
    except NotDerivable as refusal:
        assume("nothing but NaN" not in str(refusal))
        raise


def traits(case, held: dict, seed: int) -> set[str]:
    """What a case has of all that can go wrong with masks."""
    nodes = set(walk(*(o.body for o in case.program.outputs)))
    (stream,) = (a for a in case.score.free if a.name == "n")
    peak = over_score(replace(case, score=reduce("max", (stream,), case.score)))
    (top,) = evaluate(peak, tensors_for(case.program, held, seed), held).values()
    found = {
        "-inf": INF in nodes,
        "finite fill": bool(nodes & {*FILLS}),
        "-inf in a tensor": any(t.name.startswith("mask") for t in case.program.tensors),
        "empty row": bool((top == -math.inf).any()),
        "weights masked": any(isinstance(n, Where) and n.other is const(0.0) for n in nodes),
        "rows by any()": any(isinstance(n, Reduce) and n.op == "any" for n in nodes),
    }
    return {name for name, has in found.items() if has}


def test_the_programs_drawn_have_every_kind_of_mask():
    seen: Counter = Counter()

    @given(cases(), sizes, seeds)
    @fixed(200)
    def look(case, held, seed):
        seen.update(traits(case, held, seed))

    look()
    assert len(seen) == 6 and min(seen.values()) >= 15, seen


@given(cases(), sizes, seeds)
@fixed(200)
def test_a_chain_means_what_the_program_means(case, held, seed):
    chain = derived(case)
    tensors = tensors_for(case.program, held, seed)
    want, got = evaluate(case.program, tensors, held), chain_values(chain, tensors, held)
    assert [o.name for o in chain.outputs] == [o.name for o in case.program.outputs]
    for name in want:
        assert_same(got[name], want[name])
    assert "proved on" in chain.derivation[-1]


@given(cases(), sizes, seeds)
@fixed(60)
def test_masked_rows_may_be_zero(case, held, seed):
    """`masked_rows="zero"` differs from the program only where that is NaN, and nothing is NaN: no row is but an
    empty one.
    """
    chain = derived(case, "zero")
    tensors = tensors_for(case.program, held, seed)
    want, got = evaluate(case.program, tensors, held), chain_values(chain, tensors, held)
    for name in want:
        kept = ~want[name].isnan()
        assert_same(got[name][kept], want[name][kept])
        assert not got[name].isnan().any()


@given(cases(), seeds)
@fixed(10)
def test_a_proof_is_deterministic_and_holds_for_other_seeds(case, seed):
    chain = derived(case)
    assert prove(case.program, chain) == prove(case.program, chain)
    assert prove(case.program, chain, seed).ok


@given(cases())
@fixed(10)
def test_definitions_are_in_order_and_distinct(case):
    chain = derived(case)
    known: set[str] = set()
    for d in chain.definitions:
        assert {n.name for n in walk(d.body, d.predicate) if hasattr(n, "name")} & chain_names(chain) <= known
        known.add(d.name)
    assert len({(d.op, d.predicate, d.body) for d in chain.definitions}) == len(chain.definitions)


def chain_names(chain: Chain) -> set[str]:
    return {d.name for d in chain.definitions}


# Several reductions, axes and outputs


@pytest.mark.parametrize("part", range(4))
def test_wider_programs(part):
    """Chains mean what programs mean, and nearly all of them have one."""
    outcomes: Counter = Counter()

    @seed(part)
    @given(wider_programs(), sizes, seeds)
    @settings(fixed(100), derandomize=False)
    def every_program(program, held, seed):
        try:
            chain = derive(program)
        except NotDerivable as refusal:
            outcomes[str(refusal)] += 1
            return
        outcomes["derived"] += 1
        tensors = tensors_for(program, held, seed)
        want, got = evaluate(program, tensors, held), chain_values(chain, tensors, held)
        for name in want:
            assert_same(got[name], want[name])

    every_program()
    assert outcomes["derived"] >= 95 / 100 * outcomes.total(), outcomes
