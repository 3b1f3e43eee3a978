"""Random Programs for property tests, and a plain way to evaluate them and the chains derived from them.

`fixed(n)` draws the same n examples every time; with `FLASHLIGHT_EXAMPLES=20` twenty times as many, and others.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rewriter.derive import Chain, Definition
from rewriter.derive.factors import multiply
from rewriter.ir import (
    Axis,
    Const,
    Index,
    Load,
    Node,
    Output,
    Param,
    Program,
    Tensor,
    apply,
    cast,
    const,
    index,
    reduce,
    substitute,
    where,
)
from rewriter.ir.evaluate import Evaluator, evaluate

MORE = int(os.environ.get("FLASHLIGHT_EXAMPLES", "0"))
INF = const(-math.inf)
FILLS = (const(-1e4), const(-1e9), const(torch.finfo(torch.float32).min))


def fixed(examples: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples * (MORE or 1),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )


B, M, N = Param("B"), Param("M"), Param("N")

# Scores are contracted from q and k, changed, masked, weighed and summed against v.


@dataclass(frozen=True)
class Case:
    """A program with the score it is built on."""

    program: Program
    score: Node


def load(name: str, *at: Node, dtype: torch.dtype = torch.float32) -> Load:
    """A tensor that is as large as the positions it is read at need."""
    axes = [next(iter(entry.free), Axis("one", Const(1))) for entry in at]
    name = "_".join([name, *(a.name for a in axes)])
    return Load(Tensor(name, tuple(a.extent for a in axes), dtype), tuple(at))


def pick(draw, *options):
    return draw(st.sampled_from(options))


@st.composite
def predicates(draw, b: Node, m: Node, n: Node, deep: int = 2) -> Node:
    """Which positions a row sees."""
    kind = pick(draw, *range(9 if deep else 7))
    width = Const(draw(st.integers(1, 4)))
    match kind:
        case 0:
            return apply("le", n, m)
        case 1:
            return apply("lt", apply("sub", m, n), width)
        case 2:
            return apply("lt", n, load("lengths", b, dtype=torch.int64))
        case 3:
            ids = (load("id", b, m, dtype=torch.int64), load("id", b, n, dtype=torch.int64))
            return apply("eq", *ids)
        case 4:
            return apply("eq", apply("floordiv", m, width), apply("floordiv", n, width))
        case 5:
            return apply("eq", apply("mod", apply("sub", m, n), width), Const(0))
        case 6:
            return load("keep", m, n, dtype=torch.bool)
        case 7:
            return apply("not", draw(predicates(b, m, n, 0)))
    sides = (draw(predicates(b, m, n, deep - 1)), draw(predicates(b, m, n, deep - 1)))
    return apply(pick(draw, "and", "or"), *sides)


@st.composite
def scores(draw, b: Node, h: Node, m: Node, n: Node) -> Node:
    """What is exponentiated or gated: a contraction, then changes and masks in any order."""
    d = Axis("d", Const(draw(st.integers(1, 3))))
    kv = apply("floordiv", h, Const(2)) if draw(st.booleans()) else h
    s = reduce("sum", (d,), apply("mul", load("q", b, h, m, Index(d)), load("k", b, kv, n, Index(d))))
    steps = [pick(draw, _scaled, _biased, _by_distance, _capped, _less_by_row) for _ in range(pick(draw, 0, 1, 2))]
    masks = [pick(draw, _filled, _filled, _added, _by_tensor) for _ in range(pick(draw, 0, 1, 1, 2))]
    for change in draw(st.permutations([*steps, *masks])):
        s = change(draw, s, b, h, m, n)
    return s


def _scaled(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return apply(pick(draw, "mul", "div"), s, const(pick(draw, 0.5, 1.7)))


def _biased(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return apply("add", s, load("bias", *pick(draw, (m, n), (b, n), (h, m, n))))


def _by_distance(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    distance = cast(apply("sub", n, m), torch.float32)
    return apply("add", s, apply("mul", load("slopes", h), distance))


def _capped(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return apply("mul", apply("tanh", apply("div", s, const(2.0))), const(2.0))


def _less_by_row(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return apply("sub", s, load("rowbias", m))


def _filled(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return where(draw(predicates(b, m, n)), s, pick(draw, INF, INF, *FILLS))


def _added(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    fill = pick(draw, INF, INF, const(-1e4))
    return apply("add", s, where(draw(predicates(b, m, n)), const(0.0), fill))


def _by_tensor(draw, s: Node, b: Node, h: Node, m: Node, n: Node) -> Node:
    return apply("add", s, load("mask", *pick(draw, (m, n), (b, n))))


def masked_again(draw, weight: Node, n: Axis, rows: tuple[Node, ...]) -> Node:
    """A weight as it is, or 0 where a mask does not hold or a row has nothing that it keeps."""
    kind = pick(draw, "", "", "positions", "rows")
    if not kind:
        return weight
    b, _, m = rows
    keep = draw(predicates(b, m, Index(n)))
    keep = keep if kind == "positions" else reduce("any", (n,), keep)
    return where(keep, weight, const(0.0, weight.dtype))


def normalised(draw, s: Node, n: Axis, v: Node, rows: tuple[Node, ...]) -> tuple[Node, Node]:
    """(softmax of s against v, its sum of exponentials) in one of many spellings."""
    peak = reduce("max", (n,), s)
    shift = pick(draw, "max", "max", "none", "clamped", "settled")
    if shift == "clamped":
        peak = apply("maximum", peak, const(0.0))
    if shift == "settled":
        peak = where(apply("isinf", peak), const(0.0), peak)
    e = apply("exp", s if shift == "none" else apply("sub", s, peak))
    e = masked_again(draw, e, n, rows)
    total = reduce("sum", (n,), e)
    if draw(st.booleans()):
        extra = apply("neg", peak) if shift != "none" else const(0.0)
        total = apply("add", total, pick(draw, const(1e-6), apply("exp", extra)))
    early, gated = draw(st.booleans()), draw(st.booleans())
    if gated:
        v = apply("mul", v, load("gate", *rows))
    if not early:
        return apply("div", reduce("sum", (n,), apply("mul", e, v)), total), total
    weight = cast(apply("div", e, total), pick(draw, torch.float32, torch.float16))
    weight = masked_again(draw, weight, n, rows)
    return reduce("sum", (n,), apply("mul", cast(weight, torch.float32), v)), total


def with_sink(s: Node, n: Axis, v: Node, sink: Node) -> tuple[Node, Node]:
    """Softmax over the scores and one more, which has no value: cat, softmax, cut off."""
    wide = Axis("w", apply("add", n.extent, Const(1)))
    joined = where(apply("lt", Index(wide), n.extent), substitute(s, {n: Index(wide)}), sink)
    peak = reduce("max", (wide,), joined)
    total = reduce("sum", (wide,), apply("exp", apply("sub", joined, peak)))
    weight = apply("div", apply("exp", apply("sub", s, peak)), total)
    return reduce("sum", (n,), apply("mul", weight, v)), total


def gated_sum(draw, s: Node, n: Axis, v: Node) -> tuple[Node, Node]:
    """Pointwise weights instead of softmax, normalised by their sum or not."""
    zero = const(0.0)
    weight = {
        "sigmoid": apply("sigmoid", s),
        "relu": apply("maximum", s, zero),
        "squared": apply("mul", apply("maximum", s, zero), apply("maximum", s, zero)),
    }[pick(draw, "sigmoid", "relu", "squared")]
    total = apply("add", reduce("sum", (n,), weight), const(0.5))
    out = reduce("sum", (n,), apply("mul", weight, v))
    return (apply("div", out, total) if draw(st.booleans()) else out), total


@st.composite
def cases(draw) -> Case:
    b, h, m, e = Axis("b", B), Axis("h", Const(2)), Axis("m", M), Axis("e", Const(2))
    n = Axis("n", draw(st.sampled_from([N, M])))
    at = tuple(map(index, (b, h, m)))
    s = draw(scores(*at, Index(n)))
    v = (
        load("v", index(b), Index(n), index(e))
        if draw(st.booleans())
        else load("v", index(b), index(h), Index(n), index(e))
    )
    kind = pick(draw, "softmax", "softmax", "softmax", "sink", "gated")
    if kind == "softmax":
        out, total = normalised(draw, s, n, v, at)
    elif kind == "sink":
        out, total = with_sink(s, n, v, load("sink", index(h)))
    else:
        out, total = gated_sum(draw, s, n, v)
    outputs = [Output("out", (b, h, m, e), out, torch.float32)]
    more = pick(draw, "", "", "total", "lse", "peak")
    if more:
        body = {"total": total, "lse": apply("log", total), "peak": reduce("max", (n,), s)}[more]
        outputs.append(Output(more, (b, h, m), body, torch.float32))
    return Case(Program("random", tuple(draw(st.permutations(outputs)))), s)


# Evaluation with tensors that are stored, unlike those of `derive/prove.py`.


def tensors_for(program: Program, sizes: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    extent = Evaluator({}, sizes).extent
    out = {}
    for tensor in program.tensors:
        shape = tuple(map(extent, tensor.shape))
        if tensor.dtype.is_floating_point:
            out[tensor.name] = torch.randn(shape, dtype=torch.float64, generator=generator)
            if tensor.name.startswith("mask"):
                out[tensor.name][torch.rand(shape, generator=generator) < 0.4] = -math.inf
        else:
            most = 2 if tensor.dtype is torch.bool or tensor.name.startswith("id") else max(sizes.values()) + 1
            out[tensor.name] = torch.randint(0, most, shape, generator=generator).to(tensor.dtype)
    return out


def chain_values(chain: Chain, tensors: dict, sizes: dict) -> dict[str, torch.Tensor]:
    """What a chain says, definition by definition over the whole stream at once."""
    evaluator = Evaluator(tensors, sizes)
    for d in chain.definitions:
        body = reduce(d.op, (d.stream,), settled_body(d), d.predicate)
        evaluator.refs[d.name] = evaluator.output(Output(d.name, d.axes, body, d.body.dtype))
    return {o.name: evaluator.output(o) for o in chain.outputs}


def settled_body(d: Definition) -> Node:
    """What is summed, a shift of -inf counting as 0: the sum of a row that sees only -inf is 0, not NaN."""
    if d.shift is None:
        return d.body
    phi = where(apply("eq", d.shift.phi, INF), const(0.0), d.shift.phi)
    inner = apply("sub", d.shift.exponent, phi)
    return multiply([apply("exp", inner), *([inner] if d.shift.mass else []), *d.rest])


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


def assert_equivalent(before: Program, after: Program, sizes: dict, seed: int) -> None:
    tensors = tensors_for(before, sizes, seed)
    want, got = evaluate(before, tensors, sizes), evaluate(after, tensors, sizes)
    assert want.keys() == got.keys()
    for name in want:
        assert_same(got[name], want[name])
