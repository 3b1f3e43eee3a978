"""A proof finds what is wrong with a chain, and deriving refuses what has no one-pass form."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from rewriter.derive import Definition, NotDerivable, Shift, derive
from rewriter.derive.factors import multiply
from rewriter.derive.prove import Proof, prove
from rewriter.ir import TRUE, Axis, Const, Index, Node, Output, Program, apply, const, reduce, substitute, where
from rewriter.ir.evaluate import Evaluator, evaluate
from tests.strategies import INF, M, N, assert_same, chain_values, load, tensors_for

m, e, n, d = Axis("m", M), Axis("e", Const(2)), Axis("n", N), Axis("d", Const(4))
QK = apply("mul", load("q", Index(m), Index(d)), load("k", Index(n), Index(d)))
S = reduce("sum", (d,), QK)
V = load("v", Index(n), Index(e))
KEPT = apply("lt", apply("sub", Index(m), Index(n)), Const(200))


def maximum(x: Node) -> Node:
    return reduce("max", (n,), x)


def summed(x: Node) -> Node:
    return reduce("sum", (n,), x)


def program(*bodies: Node) -> Program:
    """One output per body, over the row and feature axes it has."""
    axes = [tuple(a for a in (m, e) if a in body.free) for body in bodies]
    outputs = [Output(f"out{k}", at, body, torch.float32) for k, (at, body) in enumerate(zip(axes, bodies))]
    return Program("wanted", tuple(outputs))


def softmax_of(s: Node) -> Program:
    p = apply("exp", apply("sub", s, maximum(s)))
    return program(apply("div", summed(apply("mul", p, V)), summed(p)))


WINDOWED, UNMASKED = softmax_of(where(KEPT, S, INF)), softmax_of(S)

# Ways to be wrong: each takes a definition and gives another.


def unmasked(d: Definition) -> Definition:
    return replace(d, predicate=TRUE) if d.op == "sum" else d


def seeing_nothing(d: Definition) -> Definition:
    return replace(d, predicate=apply("lt", Index(d.axes[0]), Const(0))) if d.op == "max" else d


def off_by_one(d: Definition) -> Definition:
    narrower = apply("lt", apply("sub", Index(d.axes[0]), Index(d.stream)), Const(199))
    return replace(d, predicate=narrower) if d.op == "sum" else d


def without_values(d: Definition) -> Definition:
    return replace(d, rest=())


def minimum(d: Definition) -> Definition:
    return replace(d, op="min") if d.op == "max" else d


def shifted_twice(d: Definition) -> Definition:
    phi = d.shift and apply("mul", d.shift.phi, const(2.0))
    return replace(d, shift=Shift(phi, d.shift.exponent)) if d.shift else d


def never_shifted(d: Definition) -> Definition:
    """exp(x) accumulated as it is: right where nothing overflows."""
    if d.shift is None:
        return d
    factors = (apply("exp", d.shift.exponent), *d.rest)
    return replace(d, rest=factors, shift=None, body=multiply([*factors]))


def another_exponent(d: Definition) -> Definition:
    exponent = d.shift and apply("mul", d.shift.exponent, const(1.001))
    return replace(d, shift=Shift(d.shift.phi, exponent)) if d.shift else d


WRONG = (
    unmasked,
    seeing_nothing,
    off_by_one,
    without_values,
    minimum,
    shifted_twice,
    never_shifted,
    another_exponent,
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_proof_fails_for_a_chain_that_is_wrong(wrong):
    chain = derive(WINDOWED)
    assert prove(WINDOWED, chain).ok
    made = tuple(wrong(d) for d in chain.definitions)
    proof = prove(WINDOWED, replace(chain, definitions=made))
    assert not proof.ok and "differs" in proof.reason


def test_a_proof_fails_for_an_output_that_is_wrong():
    chain = derive(UNMASKED)
    numerators = tuple(replace(o, body=o.body.args[0]) for o in chain.outputs)
    assert not prove(UNMASKED, replace(chain, outputs=numerators)).ok


def test_constants_far_beyond_the_sizes_are_met():
    """The window of 200 is as good as none at sizes 2 to 9: more cases are drawn where it is not."""
    assert prove(WINDOWED, derive(WINDOWED)).cases > prove(UNMASKED, derive(UNMASKED)).cases


def test_sizes_that_no_evaluation_bears_are_skipped_and_said():
    long = Axis("n", Const(1 << 24))
    wanted = program(reduce("sum", (long,), apply("exp", load("s", Index(m), Index(long)))))
    proof = prove(wanted, derive(wanted))
    assert proof.ok and proof.cases == 0 and "not run" in str(proof)


# Inner reductions that program and chain share


def scores(width: int, length: int | None = None) -> Node:
    wide, stream = Axis("d", Const(width)), n if length is None else Axis("n", Const(length))
    qk = apply("mul", load("q", Index(m), Index(wide)), load("k", Index(stream), Index(wide)))
    return reduce("sum", (wide,), qk)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_proof_over_wide_features_fails_for_a_chain_that_is_wrong(wrong):
    windowed = softmax_of(where(KEPT, scores(128), INF))
    chain = derive(windowed)
    assert prove(windowed, chain).ok
    assert not prove(windowed, replace(chain, definitions=tuple(map(wrong, chain.definitions)))).ok


def test_a_proof_fails_where_wide_scores_are_not_the_same():
    """Those of the chain are of other features, or at other positions."""
    d, reverse = Axis("d", Const(128)), apply("sub", apply("sub", N, Const(1)), Index(n))
    moved = apply("mul", load("q", Index(m), apply("sub", Const(127), Index(d))), load("k", Index(n), Index(d)))
    others = reduce("sum", (d,), moved), scores(64), substitute(scores(128), {n: reverse})
    wanted = softmax_of(scores(128))
    assert not any(prove(wanted, derive(softmax_of(other))).ok for other in others)


def test_features_cost_a_proof_little(monkeypatch):
    """Elements that are computed: 2048 features instead of 128 are contracted at a few ends only."""
    wanted = {width: softmax_of(scores(width)) for width in (128, 2048)}
    chains = {width: derive(program) for width, program in wanted.items()}
    counted = dict.fromkeys(wanted, 0)
    fitting = Evaluator._fitting

    def count(self, node, values):
        counted[width] += math.prod(map(max, zip(*(v.shape for v in values))))
        return fitting(self, node, values)

    monkeypatch.setattr(Evaluator, "_fitting", count)
    for width, chain in chains.items():
        assert prove(wanted[width], chain).cases == 3
    assert counted[2048] - counted[128] < 100 * (2048 - 128)


def test_a_long_vocabulary_is_proved():
    s = scores(2048, 1 << 15)
    (stream,) = s.free - {m}
    wanted = program(apply("log", reduce("sum", (stream,), apply("exp", s))))
    assert prove(wanted, derive(wanted)).cases


def test_rows_that_seldom_see_anything_are_proved():
    """Four kinds of ids that must all be equal: in the first cases, no row sees a position."""
    kept = TRUE
    for t in ("id", "kind", "part", "page"):
        row, column = (load(t, Index(a), dtype=torch.int64) for a in (m, n))
        kept = apply("and", kept, apply("eq", row, column))
    wanted = softmax_of(where(kept, S, INF))
    assert prove(wanted, derive(wanted)).ok


def test_a_program_that_gives_nothing_but_nan_is_refused():
    with pytest.raises(NotDerivable, match="nothing but NaN"):
        derive(softmax_of(where(apply("lt", Index(n), Const(0)), S, INF)))


def test_derive_refuses_what_is_not_proved(monkeypatch):
    stage = sys.modules["rewriter.derive.derive"]
    monkeypatch.setattr(stage, "prove", lambda *_: Proof(False, 0, "because"))
    with pytest.raises(NotDerivable, match="not proved: because"):
        derive(UNMASKED)


# What has an extremum

MASKED = where(KEPT, S, INF)
LEAST = reduce("min", (n,), S)
SELECTED = {
    "sum": summed(where(apply("eq", S, maximum(S)), V, const(0.0))),
    "at least the maximum": summed(where(apply("le", maximum(S), S), V, const(0.0))),
    "at most the minimum": summed(where(apply("le", S, LEAST), V, const(0.0))),
    "count": summed(apply("cast", apply("eq", LEAST, S), dtype=torch.float32)),
    "position": reduce("min", (n,), Index(n), apply("eq", S, maximum(S))),
    "of masked scores": summed(where(apply("eq", MASKED, maximum(MASKED)), V, const(0.0))),
    "among what is kept": summed(
        where(apply("and", KEPT, apply("eq", S, reduce("max", (n,), S, KEPT))), V, const(0.0))
    ),
}


@pytest.mark.parametrize("name", SELECTED)
def test_what_has_an_extremum_is_reduced_beside_it(name):
    chain = derive(program(SELECTED[name]))
    assert {d.sweep for d in chain.definitions} == {0}


@pytest.mark.parametrize("name", SELECTED)
def test_a_selection_that_does_not_start_again_is_not_proved(name):
    chain = derive(program(SELECTED[name]))
    kept = tuple(replace(d, extremum=None) for d in chain.definitions)
    assert not prove(program(SELECTED[name]), replace(chain, definitions=kept)).ok


# What no single sweep computes


def weights(shift: Node) -> Node:
    return apply("exp", apply("sub", S, shift))


MEAN = apply("div", summed(S), const(7.0))
OTHER = load("other", Index(m), Index(n))
TWO_SWEEPS = {
    "a maximum of what depends on a sum": maximum(apply("abs", apply("sub", S, MEAN))),
    "a maximum of a normalised weight's tanh": maximum(apply("tanh", apply("div", S, summed(apply("exp", S))))),
    "a gate on a difference to the mean": summed(apply("maximum", apply("sub", S, MEAN), const(0.0))),
    "an exponential shifted by a minimum": summed(weights(reduce("min", (n,), S))),
    "an exponential shifted by a mean": summed(weights(MEAN)),
    "an exponential shifted by another maximum": summed(weights(maximum(OTHER))),
    "an exponential shifted by half the maximum": summed(weights(apply("mul", maximum(S), const(0.5)))),
    "an exponential shifted the wrong way": summed(apply("exp", apply("add", S, maximum(S)))),
    "an exponential of the negated score, shifted by its maximum": summed(
        apply("exp", apply("sub", apply("neg", S), maximum(S)))
    ),
    "an exponential multiplied by a maximum": summed(apply("exp", apply("mul", S, maximum(S)))),
    "an exponential shifted by two maxima": summed(
        apply("exp", apply("sub", apply("sub", S, maximum(S)), maximum(OTHER)))
    ),
    "a maximum of masked scores below unmasked ones": summed(weights(maximum(where(KEPT, S, INF)))),
    "a mask that depends on a maximum": summed(
        where(apply("lt", apply("mul", maximum(S), const(0.5)), S), V, const(0.0))
    ),
    "what equals the maximum of other scores": summed(where(apply("eq", S, maximum(OTHER)), V, const(0.0))),
    "what equals the maximum of a part": summed(where(apply("eq", S, reduce("max", (n,), S, KEPT)), V, const(0.0))),
    "what is at most the maximum": summed(where(apply("le", S, maximum(S)), V, const(0.0))),
    "a sum of squares around the mean": summed(apply("mul", apply("sub", S, MEAN), apply("sub", S, MEAN))),
    "softmax of softmax": summed(apply("exp", apply("div", weights(maximum(S)), summed(weights(maximum(S)))))),
}


@pytest.mark.parametrize("name", TWO_SWEEPS)
def test_another_sweep_reads_what_the_first_left(name):
    chain = derive(program(TWO_SWEEPS[name]))
    assert {d.sweep for d in chain.definitions} == {0, 1}
    assert any("another sweep" in line for line in chain.derivation)
    assert "proved on" in chain.derivation[-1]


def test_what_cancels_in_the_program_may_cancel():
    """E[xy] - E[x] E[y]: where one weight is all, rounding is all that is left, and says nothing of the chain."""
    w = load("w", Index(n), Index(e))
    s = apply("mul", S, const(0.02))
    p = apply("exp", apply("sub", s, maximum(s)))
    xy, x, y = (apply("div", summed(apply("mul", p, v)), summed(p)) for v in (apply("mul", V, w), V, w))
    wanted = program(apply("sub", xy, apply("mul", x, y)))
    chain = derive(wanted)
    assert {d.sweep for d in chain.definitions} == {0}
    assert all(prove(wanted, chain, seed).ok for seed in range(12))


def test_streams_of_their_own():
    """Two reductions over different axes, multiplied: each its own sweep, neither reads the other."""
    j = Axis("j", apply("add", M, N))
    second = reduce("sum", (j,), load("w", Index(m), Index(j)))
    chain = derive(program(apply("mul", summed(apply("exp", S)), second)))
    assert len({d.stream for d in chain.definitions}) == 2
    assert {d.sweep for d in chain.definitions} == {0}


def test_columns_before_rows():
    """Weights normalised over the rows, summed along the stream: the columns' sums are known before any row is."""
    e = apply("exp", S)
    columns = reduce("sum", (m,), e)
    chain = derive(program(reduce("sum", (n,), apply("div", e, columns))))
    over_rows, over_columns = chain.definitions
    assert over_rows.stream is over_columns.axes[0] and over_columns.stream is over_rows.axes[0]
    assert (over_rows.sweep, over_columns.sweep) == (0, 1)


def test_a_reduction_over_two_axes_is_two():
    gate = apply("sigmoid", load("g", Index(m), Index(n), Index(e)))
    chain = derive(program(reduce("sum", (n, e), apply("mul", S, gate))))
    assert [len(d.axes) for d in chain.definitions] == [1]


def test_a_wide_output():
    """Weights returned: two sweeps, and the output has the stream's axis."""
    weight = apply("div", weights(maximum(S)), summed(weights(maximum(S))))
    wanted = Program("weights", (Output("p", (m, n), weight, torch.float32),))
    chain = derive(wanted)
    assert {d.stream for d in chain.definitions} == {chain.outputs[0].axes[1]}


def test_wide_by_wide_is_refused():
    """Σ_j p[m, j] p[j, n] v[n]: a product of two wide values, which only writing one makes cheap."""
    j, i = Axis("j", N), Axis("i", N)

    def weight(x: Axis, y: Axis) -> Node:
        s = reduce("sum", (d,), apply("mul", load("x", Index(x), Index(d)), load("x", Index(y), Index(d))))
        top = reduce("max", (y,), s)
        return apply("exp", apply("sub", s, top))

    square = reduce("sum", (j,), apply("mul", weight(i, j), weight(j, n)))
    value = reduce("sum", (n,), apply("mul", square, load("v", Index(n))))
    with pytest.raises(NotDerivable, match="wide"):
        derive(Program("rollout", (Output("out", (i,), value, torch.float32),)))


def test_outputs_keep_their_order():
    """The longer output is second here; the kernel's results are taken in the program's order."""
    p = weights(maximum(S))
    chain = derive(program(summed(p), apply("div", summed(apply("mul", p, V)), summed(p))))
    assert [o.name for o in chain.outputs] == ["out0", "out1"]
    assert [len(o.axes) for o in chain.outputs] == [1, 2]


@pytest.mark.parametrize("masked_rows", ["match", "zero"])
def test_rows_that_see_nothing(masked_rows):
    wanted = softmax_of(where(load("keep", Index(m), Index(n), dtype=torch.bool), S, INF))
    chain, held = derive(wanted, masked_rows), {"M": 3, "N": 4}
    tensors = tensors_for(wanted, held, 0)
    tensors["keep_m_n"][:, :2], tensors["keep_m_n"][1] = True, False
    got = chain_values(chain, tensors, held)["out0"]
    assert got[[0, 2]].isfinite().all()
    assert (got[1] == 0).all() if masked_rows == "zero" else got[1].isnan().all()


# Where a choice of 0 stands matters in rows that it leaves without positions: 0 is not 0 / 0.

MASK = load("keep", Index(m), Index(n), dtype=torch.bool)
E = weights(maximum(where(MASK, S, INF)))


def kept(x: Node) -> Node:
    return where(MASK, x, const(0.0))


ZERO = {
    "of weights divided before": summed(apply("mul", kept(apply("div", E, summed(kept(E)))), V)),
    "of weights never divided": summed(apply("mul", kept(E), V)),
    "of rows": where(reduce("any", (n,), MASK), apply("div", summed(kept(E)), summed(kept(E))), const(0.0)),
}
NAN = {
    "of weights divided after": summed(apply("mul", apply("div", kept(E), summed(kept(E))), V)),
    "of weights divided last": apply("div", summed(apply("mul", kept(E), V)), summed(kept(E))),
    "of weights divided before and after": apply(
        "div", summed(kept(apply("div", E, summed(kept(E))))), summed(kept(E))
    ),
}


@pytest.mark.parametrize("name", [*ZERO, *NAN])
def test_where_a_choice_stands(name):
    wanted, held = program((ZERO | NAN)[name]), {"M": 3, "N": 4}
    tensors = tensors_for(wanted, held, 0)
    tensors["keep_m_n"][:, :2], tensors["keep_m_n"][1] = True, False
    got = chain_values(derive(wanted), tensors, held)["out0"]
    assert_same(got, evaluate(wanted, tensors, held)["out0"])
    assert (got[1] == 0).all() if name in ZERO else got[1].isnan().all()


def test_ids_that_are_floats_are_equal_now_and_then():
    same = apply("eq", load("id", Index(m)), load("id", Index(n)))
    other = apply("eq", load("rows", Index(m)), load("columns", Index(n)))
    for kept in (same, other):
        wanted = softmax_of(where(kept, S, INF))
        assert prove(wanted, derive(wanted)).ok
