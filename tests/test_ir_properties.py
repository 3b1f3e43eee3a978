"""The language keeps its meaning: normal forms, substitution, interning, on random expressions and Programs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rewriter.ir import (
    Apply,
    Axis,
    Const,
    Index,
    Load,
    Output,
    Param,
    Program,
    Reduce,
    Tensor,
    apply,
    const,
    fresh_axis,
    index,
    open_reduce,
    reduce,
    reduce_over,
    substitute,
    transform,
    walk,
    where,
)
from rewriter.ir.evaluate import TooLarge, evaluate
from rewriter.ir.integer import extreme, from_poly, nonnegative, proves, to_poly
from tests.integers import POSITIONS, environments, node_of, trees, value_of
from tests.strategies import assert_equivalent, assert_same, cases, fixed, tensors_for

sizes = st.fixed_dictionaries({"B": st.integers(1, 2), "M": st.integers(1, 5), "N": st.integers(1, 5)})
seeds = st.integers(0, 1 << 20)


# Integers


@given(trees())
@fixed(250)
def test_normal_form_means_what_was_built(tree):
    node = node_of(tree)
    for held, at in environments(tree):
        assert value_of(node, held, at) == value_of(tree, held, at)


@given(trees())
@fixed(100)
def test_normal_form_is_normal(tree):
    """Building from the normal form's own parts changes nothing."""
    node = node_of(tree)
    assert transform(node, lambda n: n) is node
    assert from_poly(to_poly(node)) is node


@given(trees(), trees())
@fixed(100)
def test_equal_polynomials_are_one_node(left, right):
    a, b = node_of(("mul", ("add", left, right), ("sub", left, right))), node_of(("mul", left, left))
    assert node_of(("sub", b, ("mul", right, right))) is a


@given(st.sampled_from(["lt", "le", "eq"]), trees(), trees())
@fixed(300)
def test_what_is_proved_holds(op, left, right):
    a, b = node_of(left), node_of(right)
    if proves(op, a, b):
        for held, at in environments(left, right):
            assert value_of((op, a, b), held, at), (a, b, held, at)


@given(st.sampled_from(["lt", "le", "eq", "ne", "gt", "ge"]), trees(), trees())
@fixed(150)
def test_comparisons_fold_to_what_they_are(op, left, right):
    a, b = node_of(left), node_of(right)
    built = apply(op, a, b)
    python = {"ne": lambda x, y: x != y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y}
    for held, at in environments(left, right):
        x, y = value_of(a, held, at), value_of(b, held, at)
        want = python[op](x, y) if op in python else value_of((op, x, y), held, at)
        assert value_of(built, held, at) == want


@given(trees(), st.booleans())
@fixed(150)
def test_extremes_bound(tree, greatest):
    poly = to_poly(node_of(tree))
    bound = extreme(poly, greatest)
    assume(bound is not None)
    for held, at in environments(tree):
        value, limit = value_of(from_poly(poly), held, at), value_of(from_poly(bound), held, {})
        assert value <= limit if greatest else value >= limit


@given(trees())
@fixed(100)
def test_nonnegative_is(tree):
    node = node_of(("add", tree, 3))
    if nonnegative(to_poly(node)):
        assert all(value_of(node, held, at) >= 0 for held, at in environments(tree))


@given(trees(), trees(), st.sampled_from(POSITIONS))
@fixed(100)
def test_substitution_into_integers(outer, inner, axis):
    node, by = node_of(outer), node_of(("mod", inner, axis.extent))
    replaced = substitute(node, {axis: by})
    for held, at in environments(outer, inner, Index(axis)):
        moved = at | {axis: value_of(by, held, at)}
        assert value_of(replaced, held, at) == value_of(node, held, moved)


def test_views_of_views_leave_no_division():
    """[b, m, h·d] → [b, m, h, d] → [b, m, h·d]: positions come back as they were."""
    d = Param("D")
    i, h, e = Axis("i", apply("mul", Const(4), d)), Axis("h", Const(4)), Axis("e", d)
    flat = apply("add", apply("mul", Index(h), d), Index(e))
    assert apply("floordiv", flat, d) is Index(h) and apply("mod", flat, d) is Index(e)
    again = apply("add", apply("mul", apply("floordiv", Index(i), d), d), apply("mod", Index(i), d))
    assert again is Index(i) and substitute(again, {i: flat}) is flat
    repeated = apply("add", apply("mul", Index(i), d), Index(e))
    whole = apply("mul", d, Param("N"))
    assert apply("floordiv", repeated, whole) is apply("floordiv", Index(i), Param("N"))
    assert apply("mod", apply("mod", repeated, whole), d) is Index(e)
    shorter = apply("sub", d, Const(1))  # x[:, :-1].view(-1, 4)
    merged = apply("add", apply("mul", Index(e), Const(4)), Index(h))
    assert apply("floordiv", merged, apply("mul", shorter, Const(4))) is apply("floordiv", Index(e), shorter)
    heads = apply("add", apply("mod", Index(h), Const(2)), apply("floordiv", Index(h), Const(2)))
    assert apply("add", heads, apply("floordiv", Index(h), Const(2))) is Index(h)


def test_choices_between_numbers_are_one():
    """What is computed of ones and zeros is a choice between what it is of 1 and of 0."""
    p, q = (Load(Tensor(name, (Param("N"),), torch.bool), (Index(Axis("n", Param("N"))),)) for name in "pq")
    one, zero, low = const(1.0), const(0.0), const(-3e38)
    ones = where(p, where(q, one, zero), zero)
    both = apply("and", p, q)
    assert ones is where(both, one, zero) is apply("mul", where(p, one, zero), where(q, one, zero))
    assert apply("log", ones) is where(both, zero, const(-math.inf))
    assert apply("eq", ones, one) is both and apply("ne", ones, one) is apply("not", both)
    assert apply("mul", apply("cast", p, dtype=torch.float32), low) is where(p, low, zero)
    assert apply("sub", one, ones) is where(both, zero, one)
    assert where(p, zero, where(q, one, zero)) is where(apply("and", apply("not", p), q), one, zero)
    assert where(p, one, where(q, one, zero)) is where(apply("or", p, q), one, zero)
    sums = apply("add", where(p, one, zero), where(q, one, zero))  # of three numbers
    assert isinstance(sums, Apply)
    assert apply("eq", Index(Axis("n", Param("N"))), Const(-100)) is const(False)


def test_factors_of_one_are_none():
    x = Load(Tensor("x", (Const(3),), torch.float32), (Const(0),))
    assert apply("mul", const(1.0), x) is x is apply("div", apply("mul", x, const(1.0)), const(1.0))
    half = Load(Tensor("y", (Const(3),), torch.float16), (Const(0),))
    assert apply("mul", half, const(1.0)).dtype is torch.float32


# Nodes


def rebuilt(program: Program) -> Program:
    """The same program over axes of other names, every bound axis opened and closed anew."""

    def anew(node):
        if not isinstance(node, Reduce):
            return node
        axes, predicate, body = open_reduce(node, tuple(fresh_axis(a.extent, "z") for a in node.axes))
        return reduce_over(node.op, axes, body, predicate)

    def output(o: Output) -> Output:
        axes = tuple(fresh_axis(a.extent, "y") for a in o.axes)
        renamed = substitute(o.body, {a: index(b) for a, b in zip(o.axes, axes)})
        return replace(o, axes=axes, body=transform(renamed, anew))

    return replace(program, outputs=tuple(map(output, program.outputs)))


@given(cases())
@fixed(60)
def test_equality_is_alpha_equivalence(case):
    for before, after in zip(case.program.outputs, rebuilt(case.program).outputs):
        back = substitute(after.body, {a: index(b) for a, b in zip(after.axes, before.axes)})
        assert back is before.body


@given(cases(), sizes, seeds)
@fixed(40)
def test_renaming_and_rebuilding_keep_the_meaning(case, held, seed):
    assert_equivalent(case.program, rebuilt(case.program), held, seed)


@given(cases(), sizes, seeds)
@fixed(40)
def test_substitution_moves_rows(case, held, seed):
    """out[..., M - 1 - m, ...] is out flipped along m."""
    tensors = tensors_for(case.program, held, seed)
    for o in case.program.outputs:
        k = next(k for k, a in enumerate(o.axes) if a.name == "m")
        last = apply("sub", o.axes[k].extent, Const(1))
        body = substitute(o.body, {o.axes[k]: apply("sub", last, Index(o.axes[k]))})
        flipped = Program("flipped", (replace(o, body=body),))
        want = evaluate(replace(case.program, outputs=(o,)), tensors, held)[o.name].flip(k)
        assert_same(evaluate(flipped, tensors, held)[o.name], want)


@given(cases(), sizes, seeds)
@fixed(30)
def test_identity_transform(case, held, seed):
    def same(program):
        outputs = tuple(replace(o, body=transform(o.body, lambda n: n)) for o in program.outputs)
        return replace(program, outputs=outputs)

    assert_equivalent(case.program, same(case.program), held, seed)
    assert same(same(case.program)).outputs == same(case.program).outputs


@given(cases())
@fixed(30)
def test_walk_visits_every_node_once_children_first(case):
    seen = []
    for node in walk(*(o.body for o in case.program.outputs)):
        assert all(child in seen for child in node.children)
        assert node not in seen
        seen.append(node)


def test_a_constant_is_told_from_its_like():
    values = [const(1), const(1.0), const(True), const(0.0), const(-0.0), const(float("nan"))]
    assert len({id(v) for v in values}) == len(values)
    assert const(float("nan")) is const(float("nan"))
    assert const(1.0, torch.float16) is not const(1.0)


def test_a_truth_value_compared_with_a_number():
    p = apply("lt", Index(POSITIONS[0]), Index(POSITIONS[1]))
    no = apply("not", p)
    for one in (const(1), const(True), const(1.0)):
        assert apply("eq", p, one) is p and apply("ne", one, p) is no
    for zero in (const(0), const(False), const(0.0)):
        assert apply("eq", zero, p) is no and apply("ne", p, zero) is p
    assert apply("eq", p, const(2)) is not p


def test_comparisons_are_not_printed_as_a_chain():
    """a < b == c means a < b and b == c in Python."""
    x, y = (Index(POSITIONS[k]) for k in (0, 1))
    same = apply("eq", apply("lt", x, y), apply("lt", y, Const(3)))
    assert repr(same) == f"({x!r} < {y!r}) == ({y!r} < 3)"


def test_where_is_lazy_about_what_is_constant():
    x, y = const(1.0), Load(Tensor("t", (), torch.float32), ())
    assert where(const(True), x, y) is x and where(const(False), x, y) is y
    assert where(apply("lt", Index(POSITIONS[2]), Const(3)), x, y) is x


def test_reducing_one_element_is_that_element():
    one = Axis("one", Const(1))
    t = Load(Tensor("t", (Const(1),), torch.float32), (Index(one),))
    assert reduce("sum", (one,), t) is Load(t.tensor, (Const(0),))


def test_nested_reductions_do_not_capture():
    """sum_i (a[i] · sum_j a[j]): the inner one is the same node wherever it stands."""
    i, j = Axis("i", Const(3)), Axis("j", Const(3))
    t = Tensor("t", (Const(3),), torch.float32)
    inner = reduce("sum", (j,), Load(t, (Index(j),)))
    outer = reduce("sum", (i,), apply("mul", Load(t, (Index(i),)), inner))
    values = {"t": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)}
    assert evaluate(Program("p", (Output("o", (), outer, torch.float32),)), values, {})["o"] == 49
    assert inner in set(walk(outer))


def test_the_evaluator_refuses_what_is_too_large():
    axes = tuple(Axis(f"x{k}", Const(1000)) for k in range(3))
    body = Apply(
        "add",
        (Apply("add", (Index(axes[0]), Index(axes[1])), torch.int64), Index(axes[2])),
        torch.int64,
    )
    with pytest.raises(TooLarge):
        evaluate(Program("p", (Output("o", axes, body, torch.int64),)), {}, {})
