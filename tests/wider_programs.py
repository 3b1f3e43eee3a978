"""Random Programs of several reductions, axes and outputs: what one softmax against one value does not show."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from rewriter.ir import Axis, Const, Index, Node, Output, Program, apply, cast, const, index, reduce, substitute, where
from tests.strategies import B, M, N, load, pick, scores

H = 2


def over(op: str, axis: Axis, body: Node) -> Node:
    return reduce(op, (axis,), body)


def softmax(s: Node, axis: Axis) -> Node:
    e = apply("exp", apply("sub", s, over("max", axis, s)))
    return apply("div", e, over("sum", axis, e))


def weighed(w: Node, v: Node, n: Axis) -> Node:
    return over("sum", n, apply("mul", w, v))


class Drawing:
    """Axes, a score over them, and values; `draw` chooses the spellings."""

    def __init__(self, draw):
        self.draw = draw
        self.b, self.h, self.m, self.e = Axis("b", B), Axis("h", Const(H)), Axis("m", M), Axis("e", Const(2))
        self.n = Axis("n", N)
        self.at = tuple(map(index, (self.b, self.h, self.m)))
        self.rows = (self.b, self.h, self.m)
        self.v = load("v", index(self.b), index(self.h), Index(self.n), index(self.e))
        self.s = self.distance() if pick(draw, False, False, True) else draw(scores(*self.at, Index(self.n)))

    def distance(self) -> Node:
        """-|q - k|², by broadcasting"""
        d = Axis("d", Const(2))
        q, k = load("q", *self.at, Index(d)), load("k", index(self.b), index(self.h), Index(self.n), Index(d))
        gap = apply("sub", q, k)
        return apply("neg", over("sum", d, apply("mul", gap, gap)))

    def other_score(self) -> Node:
        d = Axis("d", Const(2))
        at = (index(self.b), index(self.h))
        q, k = load("p", *self.at, Index(d)), load("r", *at, Index(self.n), Index(d))
        return over("sum", d, apply("mul", q, k))

    def weights(self) -> Node:
        return softmax(self.s, self.n)

    # Outputs: (axes, body)

    def plain(self):
        return (*self.rows, self.e), weighed(self.weights(), self.v, self.n)

    def differential(self):
        """Two softmaxes, one less the other."""
        both = apply(
            "sub", self.weights(), apply("mul", load("lam", index(self.h)), softmax(self.other_score(), self.n))
        )
        return (*self.rows, self.e), weighed(both, self.v, self.n)

    def gated(self):
        """A softmax, times a gate of another score."""
        gate = apply("sigmoid", self.other_score())
        return (*self.rows, self.e), weighed(apply("mul", self.weights(), gate), self.v, self.n)

    def talking(self):
        """Weights of all heads mixed."""
        g = Axis("g", Const(H))
        mixed = over(
            "sum", g, apply("mul", load("mix", index(self.h), Index(g)), self._of_head(self.weights(), Index(g)))
        )
        return (*self.rows, self.e), weighed(mixed, self.v, self.n)

    def averaged(self):
        """Weights averaged over heads."""
        g = Axis("g", Const(H))
        mean = apply("div", over("sum", g, self._of_head(self.weights(), Index(g))), const(float(H)))
        return (self.b, self.m, self.n), mean

    def _of_head(self, node: Node, g: Node) -> Node:
        return substitute(node, {self.h: g})

    def returned(self):
        return (*self.rows, self.n), self.weights()

    def over_rows(self):
        """Rows compete for each position of the stream; then renormalised."""
        w = softmax(self.s, self.m)
        total = apply("add", over("sum", self.n, w), const(1e-3))
        return (*self.rows, self.e), apply("div", weighed(w, self.v, self.n), total)

    def entropy(self):
        w = self.weights()
        return self.rows, apply("neg", over("sum", self.n, apply("mul", w, apply("log", apply("add", w, const(1e-9))))))

    def second_moment(self):
        w = self.weights()
        mean = weighed(w, self.v, self.n)
        if pick(self.draw, True, False):
            gap = apply("sub", self.v, mean)
            return (*self.rows, self.e), weighed(w, apply("mul", gap, gap), self.n)
        return (*self.rows, self.e), weighed(w, apply("mul", self.v, self.v), self.n)

    def squared(self):
        """Weights squared and divided by their sum once more."""
        w = self.weights()
        w = apply("mul", w, w)
        return (*self.rows, self.e), apply("div", weighed(w, self.v, self.n), over("sum", self.n, w))

    def normalised(self):
        s = self.other_score()
        norm = {
            "l1": over("sum", self.n, apply("abs", s)),
            "l2": apply("sqrt", over("sum", self.n, apply("mul", s, s))),
        }[pick(self.draw, "l1", "l2")]
        norm = pick(self.draw, apply("add", norm, const(1e-3)), apply("maximum", norm, const(1.0)))
        return (*self.rows, self.e), weighed(apply("div", s, norm), self.v, self.n)

    def extremum(self):
        return self.rows, over(pick(self.draw, "max", "min"), self.n, self.other_score())

    def found(self):
        near = apply("lt", const(0.5), self.other_score())
        return self.rows, over(pick(self.draw, "any", "all"), self.n, near)

    def first_of_maxima(self):
        s = self.other_score()
        at = where(apply("eq", s, over("max", self.n, s)), Index(self.n), N)
        return self.rows, over("min", self.n, at)

    def counted(self):
        near = apply("lt", const(0.0), self.other_score())
        return self.rows, over("sum", self.n, cast(near, torch.float32))

    def of_means(self):
        """Scores standardised by their row's mean before they are exponentiated."""
        s = self.other_score()
        size = cast(N, torch.float32)
        gap = apply("sub", s, apply("div", over("sum", self.n, s), size))
        return (*self.rows, self.e), weighed(softmax(gap, self.n), self.v, self.n)

    def twice(self):
        """A softmax of a softmax."""
        return (*self.rows, self.e), weighed(softmax(self.weights(), self.n), self.v, self.n)


KINDS = (
    "plain differential gated talking averaged returned over_rows entropy second_moment squared normalised extremum"
    " found first_of_maxima counted of_means twice"
).split()


@st.composite
def wider_programs(draw) -> Program:
    """One to three outputs over one score."""
    drawing = Drawing(draw)
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    made = [(kind, *getattr(drawing, kind)()) for kind in kinds]
    return Program("wider", tuple(Output(kind, axes, body, body.dtype) for kind, axes, body in made))
