"""Losses over classes: cross-entropy, negative log-likelihood, divergences; what is ignored counts for nothing."""

from __future__ import annotations

import torch

from rewriter.ir import Axis, Node, apply, cast, const, fresh_axis, index, reduce, where
from rewriter.lift.pointwise import pointwise
from rewriter.lift.reductions import count_of
from rewriter.lift.registry import Context, lifts
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions

NONE, MEAN = 0, 1  # torch's numbers for reductions; 2 is the sum


def _reduced(ctx: Context, rows: tuple[Axis, ...], loss: Node, reduction: int, count: Node) -> Lifted:
    """The losses of rows, their sum, or that divided by the sum of what each counts."""
    if reduction == NONE:
        return Lifted(rows, cast(loss, ctx.dtype))
    total = reduce("sum", rows, loss)
    if reduction == MEAN:
        total = apply("div", total, reduce("sum", rows, count))
    return Lifted((), cast(total, ctx.dtype))


class _Classes:
    """The classes of `x`: dimension 1, or the only one. `rows` are the others."""

    def __init__(self, x: Lifted, weight: Lifted | None):
        self.x, self.weight = x, weight
        self.dim = 1 if len(x.axes) > 1 else 0
        self.rows = fresh_axes(tuple(a.extent for k, a in enumerate(x.axes) if k != self.dim))
        self.extent = x.axes[self.dim].extent

    def at(self, value: Lifted, label: Node) -> Node:
        """A value of the shape of `x`, in fp32."""
        i = positions(self.rows)
        return cast(value.at((*i[: self.dim], label, *i[self.dim :])), torch.float32)

    def score(self, label: Node) -> Node:
        return self.at(self.x, label)

    def weight_of(self, label: Node) -> Node:
        return const(1.0) if self.weight is None else cast(self.weight.at((label,)), torch.float32)

    def weighed(self, value: Node, label: Node) -> Node:
        return value if self.weight is None else apply("mul", value, self.weight_of(label))

    def log_sum(self) -> Node:
        """max x + log sum exp(x - max x) over the classes"""
        c = fresh_axis(self.extent)
        top = reduce("max", (c,), self.score(index(c)))
        total = reduce("sum", (c,), apply("exp", apply("sub", self.score(index(c)), top)))
        return apply("add", top, apply("log", total))


@lifts("cross_entropy_loss")
def cross_entropy(
    ctx: Context, x: Lifted, target: Lifted, weight=None, reduction=MEAN, ignore_index=-100, label_smoothing=0.0
) -> Lifted:
    """w[t] · (lse x - x[t]), smoothed towards the mean over classes; a mean counts the weights of what is not ignored"""
    classes = _Classes(x, weight)
    if target.body.dtype.is_floating_point:
        return _of_probabilities(ctx, classes, target, reduction, label_smoothing)
    label = target.at(positions(classes.rows))
    counted = apply("ne", label, const(ignore_index))
    label = where(counted, label, const(0))
    lse = classes.log_sum()
    loss = classes.weighed(apply("sub", lse, classes.score(label)), label)
    if label_smoothing:
        c = fresh_axis(classes.extent)
        each = classes.weighed(apply("sub", lse, classes.score(index(c))), index(c))
        spread = _share(reduce("sum", (c,), each), classes, label_smoothing)
        loss = apply("add", apply("mul", loss, const(1.0 - label_smoothing)), spread)
    count = where(counted, classes.weight_of(label), const(0.0))
    return _reduced(ctx, classes.rows, where(counted, loss, const(0.0)), reduction, count)


def _share(total: Node, classes: _Classes, smoothing: float) -> Node:
    """smoothing / number of classes · total"""
    return apply("mul", apply("div", total, cast(classes.extent, torch.float32)), const(float(smoothing)))


def _of_probabilities(ctx: Context, classes: _Classes, target: Lifted, reduction: int, smoothing: float) -> Lifted:
    """sum_c w[c] · t[c] · (lse x - x[c]); a mean counts rows"""
    c, lse = fresh_axis(classes.extent), classes.log_sum()
    each = classes.weighed(apply("sub", lse, classes.score(index(c))), index(c))
    loss = reduce("sum", (c,), apply("mul", classes.at(target, index(c)), each))
    if smoothing:
        spread = _share(reduce("sum", (c,), each), classes, smoothing)
        loss = apply("add", apply("mul", loss, const(1.0 - smoothing)), spread)
    return _reduced(ctx, classes.rows, loss, reduction, const(1.0))


@lifts("nll_loss", "nll_loss_nd", "nll_loss2d")
def nll_loss(ctx: Context, x: Lifted, target: Lifted, weight=None, reduction=MEAN, ignore_index=-100) -> Lifted:
    """-w[t] · x[t]; a mean counts the weights of what is not ignored"""
    classes = _Classes(x, weight)
    label = target.at(positions(classes.rows))
    counted = apply("ne", label, const(ignore_index))
    label = where(counted, label, const(0))
    loss = classes.weighed(apply("neg", classes.score(label)), label)
    count = where(counted, classes.weight_of(label), const(0.0))
    return _reduced(ctx, classes.rows, where(counted, loss, const(0.0)), reduction, count)


def _elementwise(ctx: Context, a: Lifted, b: Lifted, reduction: int, loss) -> Lifted:
    """loss(a, b) position by position, then the mean or sum of all."""
    if reduction == NONE:
        return pointwise(ctx, loss, a, b)
    axes = fresh_axes(a.shape if len(a.axes) >= len(b.axes) else b.shape)
    each = cast(loss(*(broadcast_at(x, positions(axes)) for x in (a, b))), torch.float32)
    total = reduce("sum", axes, each) if axes else each
    if reduction == MEAN:
        total = apply("div", total, cast(count_of(axes), torch.float32))
    return Lifted((), cast(total, ctx.dtype))


@lifts("kl_div")
def kl_div(ctx: Context, x: Lifted, target: Lifted, reduction=MEAN, *, log_target=False) -> Lifted:
    """t · (log t - x), 0 where t is 0; exp(t) · (t - x) where the target is a logarithm"""

    def of_logarithms(a: Node, t: Node) -> Node:
        return apply("mul", apply("exp", t), apply("sub", t, a))

    def of_probabilities(a: Node, t: Node) -> Node:
        entropy = where(apply("eq", t, const(0.0, t.dtype)), const(0.0, t.dtype), apply("mul", t, apply("log", t)))
        return apply("sub", entropy, apply("mul", t, a))

    return _elementwise(ctx, x, target, reduction, of_logarithms if log_target else of_probabilities)


@lifts("mse_loss")
def mse_loss(ctx: Context, x: Lifted, target: Lifted, reduction=MEAN) -> Lifted:
    """(x - t)²"""

    def loss(a: Node, t: Node) -> Node:
        away = apply("sub", a, t)
        return apply("mul", away, away)

    return _elementwise(ctx, x, target, reduction, loss)


@lifts("l1_loss")
def l1_loss(ctx: Context, x: Lifted, target: Lifted, reduction=MEAN) -> Lifted:
    """|x - t|"""
    return _elementwise(ctx, x, target, reduction, lambda a, t: apply("abs", apply("sub", a, t)))


@lifts("huber_loss", "smooth_l1_loss")
def huber_loss(ctx: Context, x: Lifted, target: Lifted, reduction=MEAN, width=1.0) -> Lifted:
    """|d| ≤ w ? d² / 2 : w · (|d| - w / 2) of d = x - t; the smooth one divides by w"""
    is_smooth = "smooth" in ctx.node.target._schema.name
    if is_smooth and not width:
        return l1_loss(ctx, x, target, reduction)

    def loss(a: Node, t: Node) -> Node:
        away = apply("sub", a, t)
        size, w = apply("abs", away), const(float(width), away.dtype)
        near = apply("mul", apply("mul", away, away), const(0.5, away.dtype))
        far = apply("mul", w, apply("sub", size, const(width / 2, away.dtype)))
        both = where(apply("le", size, w), near, far)
        return apply("div", both, w) if is_smooth else both

    return _elementwise(ctx, x, target, reduction, loss)


@lifts("binary_cross_entropy_with_logits")
def bce_with_logits(ctx: Context, x, target, weight=None, pos_weight=None, reduction=MEAN) -> Lifted:
    """(1 - t) · x - log σ(x), where -log σ(x) is log1p(exp(-|x|)) - min(x, 0)"""
    if weight is not None or pos_weight is not None:
        raise NotLiftable("binary cross-entropy with weights")

    def loss(a: Node, t: Node) -> Node:
        low = apply("minimum", a, const(0.0, a.dtype))
        soft = apply("log1p", apply("exp", apply("neg", apply("abs", a))))
        return apply("add", apply("sub", apply("mul", apply("sub", const(1.0, t.dtype), t), a), low), soft)

    return _elementwise(ctx, x, target, reduction, loss)
